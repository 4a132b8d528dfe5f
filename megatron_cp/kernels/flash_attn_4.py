"""Attention through flash-attn-4 (`flash_attn.cute`), which compiles its kernels at their first call."""

from importlib import import_module
from typing import Any, Protocol

from torch import Tensor

from megatron_cp.errors import CannotRun
from megatron_cp.kernels.flash_attn import loaded, only_cuda
from megatron_cp.kernels.fused import FusedKernel, Gradients, Only, Op
from megatron_cp.kernels.packages import Package, lacking_gpu, parameters
from megatron_cp.kernels.protocol import Window

# wider ones have constraints of their own on each generation of GPUs
WIDEST_HEAD = 128
# on an H100 the gradients of 4.0.0b36 are right at head dims 64, 96 and 128 and wrong at 104, without a word
MULTIPLE = 32
PACKAGE = Package("flash-attn-4", ("4.0.0b36",), "pip install --pre flash-attn-4")
HOPPER = (9, 0)

# passed by name; the rest has defaults
FORWARD = "q k v softmax_scale causal window_size_left window_size_right return_lse".split()
BACKWARD = "q k v out dout lse softmax_scale causal window_size_left window_size_right deterministic".split()


class CuteInterface(Protocol):
    """The part of `flash_attn.cute.interface` that is called here; tensors are `b s h d`, lse `b h s`."""

    def _flash_attn_fwd(self, **kwargs: Any) -> tuple[Tensor, ...]: ...

    def _flash_attn_bwd(self, **kwargs: Any) -> tuple[Tensor, ...]: ...


def refusal(*, device: str, dtype: str, head_dim: int) -> str | None:
    """Why this kernel cannot run that, or None."""
    return only_cuda(device, dtype, head_dim, WIDEST_HEAD)


def missing(*, device: str) -> str | None:
    """Return what this machine lacks for it, or None."""
    return PACKAGE.missing() or lacking_gpu(device, HOPPER, "a Hopper GPU")


def create(*, device: str, deterministic: bool) -> FusedKernel:
    """Raises RuntimeError when the package is there but does not load (its compiler's packages are missing)."""
    interface: Any = loaded(lambda: import_module("flash_attn.cute.interface"), PACKAGE)
    return FusedKernel("flash-4", Only(flash_4_op(interface, deterministic=deterministic)), multiple=MULTIPLE)


def flash_4_op(interface: CuteInterface, *, deterministic: bool) -> Op:
    """Return the package's op; raises CannotRun when it lacks a parameter that is passed."""
    for function, wanted in ((interface._flash_attn_fwd, FORWARD), (interface._flash_attn_bwd, BACKWARD)):
        if lacking := [name for name in wanted if name not in parameters(function)]:
            raise CannotRun(
                f"{getattr(function, '__name__', function)} of flash-attn-4 has no {', '.join(lacking)}; install "
                f"flash-attn-4 {PACKAGE.checked[-1]} or use kernel 'auto'"
            )

    def forward(
        q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: Window | None = None
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse, *_ = interface._flash_attn_fwd(q=q, k=k, v=v, return_lse=True, **_mask(scale, causal, window))
        return out.transpose(1, 2), lse

    def backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        causal: bool,
        window: Window | None = None,
    ) -> Gradients:
        dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        how = _mask(scale, causal, window) | {"deterministic": deterministic}
        dq, dk, dv, *_ = interface._flash_attn_bwd(q=q, k=k, v=v, out=out, dout=dout, lse=lse.contiguous(), **how)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)

    return Op("flash-attn 4", forward, backward, windows=True)


def _mask(scale: float, causal: bool, window: Window | None) -> dict[str, Any]:
    left, right = window or (None, None)
    return {"softmax_scale": scale, "causal": causal, "window_size_left": left, "window_size_right": right}
