"""TransformerEngine's fused attention (cuDNN) as a kernel: dense tiles in half precision.

Its FP8 form needs quantizers for q, k, v, out and their gradients, which no layer hands down here.
"""

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_cp.errors import CannotRun
from megatron_cp.kernels.flash_attn import loaded, only_cuda
from megatron_cp.kernels.fused import FusedKernel, Gradients, Only, Op
from megatron_cp.kernels.packages import Package, lacking_gpu, parameters

# the backward pass of cuDNN takes no wider ones before Blackwell
WIDEST_HEAD = 128
PACKAGE = Package(
    "transformer-engine",
    ("2.15", "2.17", "2.18", "2.20"),
    "pip install 'megatron-cp[te]'",
)
BACKEND = "F16_arbitrary_seqlen"
LAYOUT = "sbhd_sbhd_sbhd"

SIZES = "max_seqlen_q max_seqlen_kv cu_seqlens_q cu_seqlens_kv".split()
FORWARD = [
    *("is_training", *SIZES, "q", "k", "v", "fake_dtype", "fused_attention_backend"),
    *"attn_scale dropout qkv_layout attn_mask_type attn_bias_type".split(),
]
BACKWARD = [
    *(*SIZES, "q", "k", "v", "o", "d_o", "fake_dtype", "aux_ctx_tensors", "fused_attention_backend"),
    *"attn_scale dropout qkv_layout dqkv_layout attn_mask_type attn_bias_type deterministic".split(),
]


def refusal(*, device: str, dtype: str, head_dim: int) -> str | None:
    """Why this kernel cannot run that, or None."""
    return only_cuda(device, dtype, head_dim, WIDEST_HEAD)


def missing(*, device: str) -> str | None:
    """Return what this machine lacks for it, or None."""
    return PACKAGE.missing() or lacking_gpu(device)


def create(*, device: str, deterministic: bool) -> FusedKernel:
    """Raises RuntimeError when the package is there but does not load (its extension for torch is missing)."""
    interface: Any = loaded(lambda: import_module("transformer_engine.pytorch.cpp_extensions.fused_attn"), PACKAGE)
    return FusedKernel("te", Only(fused_op(interface, deterministic=deterministic)))


def fused_op(interface: ModuleType, *, deterministic: bool) -> Op:
    """Return the package's op, with the calling convention that this release has."""
    run_forward, run_backward = interface.fused_attn_fwd, interface.fused_attn_bwd
    for name, function, wanted in (("fwd", run_forward, FORWARD), ("bwd", run_backward, BACKWARD)):
        if lacking := [parameter for parameter in wanted if parameter not in parameters(function)]:
            raise CannotRun(
                f"fused_attn_{name} of transformer-engine has no {', '.join(lacking)}; install transformer-engine "
                f"{PACKAGE.checked[-1]} or use kernel 'auto'"
            )

    def how(q: Tensor, k: Tensor, scale: float, causal: bool) -> dict[str, Any]:
        queries, keys = q.shape[0], k.shape[0]
        return {
            "max_seqlen_q": queries,
            "max_seqlen_kv": keys,
            "cu_seqlens_q": _ends(queries, q),
            "cu_seqlens_kv": _ends(keys, q),
            "fake_dtype": q.dtype,
            "fused_attention_backend": interface.FusedAttnBackend[BACKEND],
            "attn_scale": scale,
            "dropout": 0.0,
            "qkv_layout": LAYOUT,
            "attn_bias_type": "no_bias",
            "attn_mask_type": "causal" if causal else "no_mask",
        }

    def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        q, k, v = _as_sbhd(q, k, v)
        out, (lse, *_) = run_forward(is_training=True, q=q, k=k, v=v, **how(q, k, scale, causal))
        # s b (h d) or s b h d -> b h s d
        return out.view(q.shape[:3] + v.shape[3:]).permute(1, 2, 0, 3), lse.squeeze(-1)

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
    ) -> Gradients:
        q, k, v, out, dout = _as_sbhd(q, k, v, out, dout)
        # the random state is looked at with dropout only
        saved = [lse.contiguous().unsqueeze(-1), torch.zeros(2, dtype=torch.int64, device=q.device)]
        options = how(q, k, scale, causal) | {
            "aux_ctx_tensors": saved, "dqkv_layout": LAYOUT, "deterministic": deterministic,
        }  # fmt: skip
        dq, dk, dv, *_ = run_backward(q=q, k=k, v=v, o=out, d_o=dout, **options)
        return dq.permute(1, 2, 0, 3), dk.permute(1, 2, 0, 3), dv.permute(1, 2, 0, 3)

    return Op("TransformerEngine", forward, backward)


def _as_sbhd(*tensors: Tensor) -> list[Tensor]:
    # b h s d -> s b h d; the layout that is named to the op has no other strides
    return [x.permute(2, 0, 1, 3).contiguous() for x in tensors]


def _ends(tokens: int, like: Tensor) -> Tensor:
    """Return where each of a batch's equally long sequences ends, b + 1 numbers."""
    batch = like.shape[1]
    return torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=like.device)
