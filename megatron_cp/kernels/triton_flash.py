"""Attention by Triton kernels of ours, which drop weights without ever holding the score matrix.

The only kernel for GPUs that drops the weights of the reference, bit for bit: fused ops draw numbers of their own,
which depend on how a sequence is cut. Source: FlashAttention-2 (Dao 2023), with the counter of
`megatron_cp.kernels.dropout`.
"""

from importlib.util import find_spec
from math import inf

import torch
from jaxtyping import Float
from torch import Tensor

from megatron_cp.kernels.dropout import COLUMNS, labels
from megatron_cp.kernels.packages import lacking_gpu
from megatron_cp.kernels.protocol import Window, check_backward, check_call

DTYPES = ("bfloat16", "float16", "float32")
WIDEST_HEAD = 256


def refusal(*, device: str, dtype: str, head_dim: int) -> str | None:
    """Return why this kernel cannot run that, or None."""
    if device != "cuda":
        return f"needs a CUDA device, not {device}"
    if dtype not in DTYPES:
        return f"computes in {', '.join(DTYPES)}, not in {dtype}"
    return None if head_dim <= WIDEST_HEAD else f"takes head dims up to {WIDEST_HEAD}, not {head_dim}"


def missing(*, device: str) -> str | None:
    """Return what this machine lacks for it, or None."""
    return lacking_gpu(device) if find_spec("triton") else "needs the package triton, which comes with torch for CUDA"


def create(*, device: str, deterministic: bool) -> "TritonKernel":
    """Return the kernel, whose results are equal bit for bit in any case."""
    return TritonKernel()


class TritonKernel:
    """Attention in memory that grows with the tokens: scores are computed again in the backward pass."""

    name = "triton"
    windows = True

    def __init__(self, dropout: float = 0.0) -> None:
        self._dropout = dropout

    def dropping(self, rate: float) -> "TritonKernel":
        """Return the kernel that drops weights (Srivastava et al. 2014, JMLR 15) by the last columns of q and k."""
        return TritonKernel(rate)

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
        """out in q's dtype and lse; one launch."""
        from megatron_cp.kernels.triton_passes import forward

        q, k, drawn = self._taken_apart(q, k)
        check_call(q, k, v, causal, window)
        return forward(q, k, v, scale, (None, 0) if causal else window or (None, None), drawn, self._dropout)

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
        """dq, dk, dv in the inputs' dtype; two launches without atomics, by blocks of queries and by blocks of keys."""
        from megatron_cp.kernels.triton_passes import backward

        dim = q.shape[3]
        q, k, drawn = self._taken_apart(q, k)
        check_call(q, k, v, causal, window)
        check_backward(dout, q, v, out, lse)
        dout = dout if dout.stride(3) == 1 else dout.contiguous()
        # b h s: the part of a row's softmax that its own weights take from each gradient
        delta = (out.float() * dout.float()).sum(-1).permute(1, 2, 0).contiguous()
        # a row that saw no key has weights of 0
        rows = lse.masked_fill(lse == -inf, inf).permute(1, 2, 0).contiguous()
        # columns that are no part of the product have no gradient
        dq, dk = (torch.zeros((*x.shape[:3], dim), dtype=x.dtype, device=x.device) for x in (q, k))
        dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        seen = (None, 0) if causal else window or (None, None)
        backward(dout, q, k, v, delta, rows, dq, dk, dv, scale, seen, drawn, self._dropout)
        return dq, dk, dv

    def _taken_apart(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Return q and k without their last columns, and the numbers that these hold."""
        if not self._dropout:
            return q, k, None
        return q[..., :-COLUMNS], k[..., :-COLUMNS], labels(q, k)
