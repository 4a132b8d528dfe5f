"""Attention through the flash-attn package (FlashAttention-2, Dao 2023), releases 2.6 to 2.8."""

from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_cp.errors import CannotRun
from megatron_cp.kernels.fused import FusedKernel, Gradients, Only, Op
from megatron_cp.kernels.packages import Package, check_parameters, lacking_gpu
from megatron_cp.kernels.protocol import Window

DTYPES = ("bfloat16", "float16")
WIDEST_HEAD = 256
PACKAGE = Package("flash-attn", ("2.6", "2.7", "2.8"), "pip install 'megatron-cp[flash]'")

# 2.7 split window_size in two, returns out and lse first, and goes through torch's dispatcher
INPUTS, BUFFERS = "q k v".split(), "dq dk dv".split()
OPTIONS = "dropout_p softmax_scale causal".split()
ONE_WINDOW, TWO_LIMITS = ["window_size"], ["window_size_left", "window_size_right"]
FORWARD = {
    split: [*INPUTS, *OPTIONS, *window, "softcap", "alibi_slopes", "return_softmax"]
    for split, window in ((False, ONE_WINDOW), (True, TWO_LIMITS))
}
BACKWARD = {
    split: [
        "dout", *INPUTS, "out", "softmax_lse", *BUFFERS, *OPTIONS, *window,
        "softcap", "alibi_slopes", "deterministic", "rng_state",
    ]
    for split, window in ((False, ONE_WINDOW), (True, TWO_LIMITS))
}  # fmt: skip


class Interface(Protocol):
    """The part of `flash_attn.flash_attn_interface` that is called here; tensors are `b s h d`, lse `b h s`."""

    def _flash_attn_forward(self, *args: object, **kwargs: object) -> tuple[Tensor, ...]: ...

    def _flash_attn_backward(self, *args: object, **kwargs: object) -> object: ...


def refusal(*, device: str, dtype: str, head_dim: int) -> str | None:
    """Why this kernel cannot run that, or None."""
    return only_cuda(device, dtype, head_dim, WIDEST_HEAD)


def only_cuda(device: str, dtype: str, head_dim: int, widest: int) -> str | None:
    """Why a kernel for half precision on CUDA cannot run that, or None."""
    if device != "cuda":
        return f"needs a CUDA device, not {device}"
    if dtype not in DTYPES:
        return f"computes in {' and '.join(DTYPES)}, not in {dtype}"
    if head_dim > widest:
        return f"takes head dims up to {widest}, not {head_dim}"
    return None


def missing(*, device: str) -> str | None:
    """Return what this machine lacks for it, or None."""
    return PACKAGE.missing() or lacking_gpu(device)


def create(*, device: str, deterministic: bool) -> FusedKernel:
    """Raises RuntimeError when the package is there but does not load (built for another torch or CUDA)."""
    interface: Interface = loaded(lambda: import_module("flash_attn.flash_attn_interface"), PACKAGE)
    return FlashKernel(interface, deterministic=deterministic)


class FlashKernel(FusedKernel):
    """The package's kernel, which caps scores where it is asked to; a softcap of 0 is none."""

    def __init__(self, interface: Interface, *, deterministic: bool, softcap: float = 0.0) -> None:
        super().__init__("flash", Only(flash_op(interface, deterministic=deterministic, softcap=softcap)))
        self._interface, self._deterministic = interface, deterministic

    def capped(self, softcap: float) -> "FlashKernel":
        """Return the kernel that caps scores."""
        return FlashKernel(self._interface, deterministic=self._deterministic, softcap=softcap)


def loaded(load: Callable[[], Any], package: Package) -> Any:
    """Return a package's module; raises CannotRun when it does not load."""
    try:
        return load()
    except ImportError as error:
        raise CannotRun(
            f"{package.name} is installed but does not load: {error}; reinstall it for this torch and CUDA driver"
        ) from error


def flash_op(interface: Interface, *, deterministic: bool, softcap: float = 0.0) -> Op:
    """Return the package's op, with the calling convention that this release has."""
    forms = [FORWARD[split] for split in (False, True)]
    split = check_parameters(PACKAGE.name, interface._flash_attn_forward, *forms) == FORWARD[True]
    check_parameters(PACKAGE.name, interface._flash_attn_backward, BACKWARD[split])
    run_forward = getattr(interface, "_wrapped_flash_attn_forward", interface._flash_attn_forward)
    run_backward = getattr(interface, "_wrapped_flash_attn_backward", interface._flash_attn_backward)
    lse_index = 1 if split else 5

    def limits(window: Window | None) -> tuple[object, ...]:
        both = no_limit(window)
        return both if split else (both,)

    def forward(
        q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: Window | None = None
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        results = run_forward(q, k, v, 0.0, scale, causal, *limits(window), softcap, None, False)
        return results[0].transpose(1, 2), results[lse_index]

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
        dq, dk, dv = buffers(q, k, v)
        # the kernel reads lse through a bare pointer, as b h s
        lse, how = lse.contiguous(), (0.0, scale, causal, *limits(window), softcap, None, deterministic, None)
        run_backward(dout, q, k, v, out, lse, dq, dk, dv, *how)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)

    return Op("flash-attn", forward, backward, windows=True)


def no_limit(window: Window | None) -> tuple[int, int]:
    """Return a window with -1 where it has no limit."""
    left, right = window or (None, None)
    return (-1 if left is None else left), (-1 if right is None else right)


def buffers(*like: Tensor) -> list[Tensor]:
    """Allocate results shaped like these tensors, whatever the strides of those."""
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in like]
