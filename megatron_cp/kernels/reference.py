"""Dense attention written out: the oracle that every other kernel and every backend is compared with."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from megatron_cp.kernels.dropout import COLUMNS, kept
from megatron_cp.kernels.protocol import Window, check_backward, check_call


def refusal(*, device: str, dtype: str, head_dim: int) -> str | None:
    return None


def missing(*, device: str) -> str | None:
    return None


def create(*, device: str, deterministic: bool) -> "ReferenceKernel":
    return ReferenceKernel()


class ReferenceKernel:
    """Attention with the whole score matrix in memory, in float32 or, for float64 inputs, in float64."""

    name = "reference"
    windows = True

    def __init__(self, softcap: float | None = None, dropout: float = 0.0) -> None:
        self._softcap, self._dropout = softcap, dropout

    def capped(self, softcap: float) -> "ReferenceKernel":
        """Return the kernel that caps scores (Gemma Team 2024, arXiv:2408.00118, section 2)."""
        return ReferenceKernel(softcap, self._dropout)

    def dropping(self, rate: float) -> "ReferenceKernel":
        """Return the kernel that drops weights (Srivastava et al. 2014, JMLR 15) by the last columns of q and k."""
        return ReferenceKernel(self._softcap, rate)

    def forward(
        self,
        q: Float[Tensor, "s b h d"],
        k: Float[Tensor, "t b g d"],
        v: Float[Tensor, "t b g dv"],
        *,
        scale: float,
        causal: bool,
        window: Window | None = None,
    ) -> tuple[Float[Tensor, "s b h dv"], Float[Tensor, "s b h"]]:
        """out and lse; O(s * t) memory."""
        q, k, factor = kept(q, k, self._dropout) if self._dropout else (q, k, 1.0)
        check_call(q, k, v, causal, window)
        scores = _scores(q, k, scale, (None, 0) if causal else window, self._softcap)
        # the softmax is of all weights, of which some are dropped
        lse, weights = scores.logsumexp(-1), scores.softmax(-1) * factor
        # b g r s t, t b g d -> s b (g r) d
        out = torch.einsum("bgrst,tbgd->sbgrd", weights, _wide(v)).flatten(2, 3)
        return out.to(q.dtype), lse.permute(3, 0, 1, 2).flatten(2, 3)

    def backward(
        self,
        dout: Float[Tensor, "s b h dv"],
        q: Float[Tensor, "s b h d"],
        k: Float[Tensor, "t b g d"],
        v: Float[Tensor, "t b g dv"],
        out: Float[Tensor, "s b h dv"],
        lse: Float[Tensor, "s b h"],
        *,
        scale: float,
        causal: bool,
        window: Window | None = None,
    ) -> tuple[Float[Tensor, "s b h d"], Float[Tensor, "t b g d"], Float[Tensor, "t b g dv"]]:
        """dq, dk, dv by the formulas of FlashAttention (Dao et al. 2022), section 3.1, without the tiling."""
        dropping = COLUMNS if self._dropout else 0
        q, k, factor = kept(q, k, self._dropout) if dropping else (q, k, 1.0)
        check_call(q, k, v, causal, window)
        check_backward(dout, q, v, out, lse)
        groups = k.shape[2]
        dout_, q_, out_ = (_grouped(x, groups) for x in (dout, q, out))
        scores = _scores(q, k, scale, (None, 0) if causal else window, self._softcap)
        weights = _weights(scores, _rows(lse, groups))
        delta = (out_ * dout_).sum(-1).permute(1, 2, 3, 0)
        dweights = torch.einsum("sbgrd,tbgd->bgrst", dout_, _wide(v)) * factor
        dscores = weights * (dweights - delta[..., None]) * scale
        if self._softcap is not None:
            # the slope of tanh; hidden scores are -inf and have weight 0
            dscores *= 1 - (scores.clamp(min=-self._softcap) / self._softcap).square()
        dq = torch.einsum("bgrst,tbgd->sbgrd", dscores, _wide(k)).flatten(2, 3)
        dk = torch.einsum("bgrst,sbgrd->tbgd", dscores, q_)
        dv = torch.einsum("bgrst,sbgrd->tbgd", weights * factor, dout_)
        # columns that are no part of the product have no gradient
        return pad(dq, (0, dropping)).to(q.dtype), pad(dk, (0, dropping)).to(k.dtype), dv.to(v.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _grouped(x: Tensor, groups: int) -> Tensor:
    # s b (g r) d -> s b g r d
    return _wide(x).unflatten(2, (groups, -1))


def _rows(lse: Tensor, groups: int) -> Tensor:
    # s b (g r) -> b g r s
    return lse.unflatten(2, (groups, -1)).permute(1, 2, 3, 0)


def _scores(q: Tensor, k: Tensor, scale: float, window: Window | None, softcap: float | None) -> Tensor:
    scores = torch.einsum("sbgrd,tbgd->bgrst", _grouped(q, k.shape[2]), _wide(k)) * scale
    if softcap is not None:
        scores = (scores / softcap).tanh_() * softcap
    if window is None:
        return scores
    queries, keys = scores.shape[-2:]
    # s t: how far a key lies behind its query, the last key at the last query's position
    distance = torch.arange(keys, device=q.device) - torch.arange(keys - queries, keys, device=q.device)[:, None]
    left, right = window
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left is not None:
        hidden |= distance < -left
    if right is not None:
        hidden |= distance > right
    return scores.masked_fill(hidden, float("-inf"))


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    # a row that saw no key has lse -inf and weights 0, not exp(-inf + inf)
    return (scores - lse.masked_fill(lse == float("-inf"), float("inf"))[..., None]).exp()
