"""Attention through the flash-attn package (FlashAttention-2, Dao 2023), releases 2.6 and later."""

from importlib import import_module
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from megatron_cp.errors import CannotRun
from megatron_cp.kernels.fused import FusedKernel, Gradients, Only, Op

DTYPES = ("bfloat16", "float16")
WIDEST_HEAD = 256


class Interface(Protocol):
    """The part of `flash_attn.flash_attn_interface` that is called here; tensors are `b s h d`, lse `b h s`."""

    def _flash_attn_forward(self, *args: object, **kwargs: object) -> tuple[Tensor, ...]: ...

    def _flash_attn_backward(self, *args: object, **kwargs: object) -> object: ...


def refusal(*, device: str, dtype: str, head_dim: int) -> str | None:
    """Why this kernel cannot run that, or None."""
    if device != "cuda":
        return f"needs a CUDA device, not {device}"
    if dtype not in DTYPES:
        return f"computes in {' and '.join(DTYPES)}, not in {dtype}"
    if head_dim > WIDEST_HEAD:
        return f"takes head dims up to {WIDEST_HEAD}, not {head_dim}"
    return None


def missing(*, device: str) -> str | None:
    """Return what this machine lacks for it, or None."""
    if find_spec("flash_attn") is None:
        return "needs the flash-attn package (pip install 'megatron-cp[flash]')"
    return None


def create(*, deterministic: bool) -> FusedKernel:
    """Raises RuntimeError when the package is there but does not load (built for another torch or CUDA)."""
    try:
        interface = import_module("flash_attn.flash_attn_interface")
    except ImportError as error:
        raise CannotRun(f"flash-attn is installed but does not load: {error}; reinstall it for this torch") from error
    return FusedKernel("flash", Only(flash_op(interface, deterministic=deterministic)))


def flash_op(interface: Interface, *, deterministic: bool) -> Op:
    """Return the package's op, with the calling convention that this release has."""
    # 2.7 split window_size in two, returns out and lse first, and goes through torch's dispatcher
    split_window = hasattr(interface, "_wrapped_flash_attn_forward")
    window: tuple[object, ...] = (-1, -1) if split_window else ((-1, -1),)
    run_forward = getattr(interface, "_wrapped_flash_attn_forward", interface._flash_attn_forward)
    run_backward = getattr(interface, "_wrapped_flash_attn_backward", interface._flash_attn_backward)
    lse_index = 1 if split_window else 5

    def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        results = run_forward(q, k, v, 0.0, scale, causal, *window, 0.0, None, False)
        return results[0].transpose(1, 2), results[lse_index]

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
    ) -> Gradients:
        dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        # the kernel reads lse through a bare pointer, as b h s
        lse = lse.contiguous()
        run_backward(dout, q, k, v, out, lse, dq, dk, dv, 0.0, scale, causal, *window, 0.0, None, deterministic, None)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)

    return Op("flash-attn", forward, backward)
