"""torch's fused attention ops that hand out the logsumexp and take it back, brought to one calling convention."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from megatron_cp.kernels.fused import Gradients, Op
from megatron_cp.kernels.protocol import Window
from megatron_cp.kernels.reference import ReferenceKernel

aten = torch.ops.aten

FEW_QUERIES = 768
"""The CPU op's backward adds dK and dV up in half precision, once per block of queries, and takes blocks of 256 queries
from this many on but of 64 or 32 below: tiles shorter than this are computed in float32, or they would be less exact
than the whole sequence is."""


FEW_KEYS = 16
"""With fewer keys than this the CPU op gives a row of NaN scores out 0 and lse 0 where more keys give NaN; such tiles,
and those whose lse is 0 by chance, are computed again."""


# as many as torch has floating dtypes
@lru_cache(16)
def multiplies(dtype: torch.dtype) -> bool:
    """True if the CPU multiplies matrices of this dtype.

    Otherwise float32 is faster: in half precision the op's backward takes 13 times as long, element by element, and its
    forward up to 1.1 times (AVX2).
    """
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype != torch.float16 or torch.ops.mkldnn._is_mkldnn_fp16_supported()


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    if not multiplies(q.dtype):
        q, k, v = (tensor.float() for tensor in (q, k, v))
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    if k.shape[2] < FEW_KEYS and bool((lse == 0).any()):
        # b h s d -> s b h d -> b h s d
        here = (x.permute(2, 0, 1, 3) for x in (q, k, v))
        dense, log_sum = ReferenceKernel().forward(*here, scale=scale, causal=causal)
        return dense.permute(1, 2, 0, 3), log_sum.permute(1, 2, 0)
    return out, lse


def _cpu_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> Gradients:
    few = q.shape[2] < FEW_QUERIES and q.dtype in (torch.bfloat16, torch.float16)
    if few or not multiplies(q.dtype):
        dout, q, k, v, out = (tensor.float() for tensor in (dout, q, k, v, out))
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, out, lse, 0.0, causal, scale=scale)


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: Window | None = None
) -> tuple[Tensor, Tensor]:
    if window is not None:
        # b h s d -> b s h d, which the op under the one for scaled_dot_product_attention takes
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        lengths = (q.shape[1], k.shape[1])
        out, lse, *_ = aten._flash_attention_forward(
            q, k, v, None, None, *lengths, 0.0, causal, False, scale=scale, **_limits(window)
        )
        return out.transpose(1, 2), lse
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return out, lse


def _flash_backward(
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
    # the random state is looked at with dropout only
    seed, offset = q.new_empty(2, dtype=torch.uint64), q.new_empty((), dtype=torch.uint64)
    # the op reads lse through a bare pointer, as b h s
    lse = lse.contiguous()
    lengths = (q.shape[2], k.shape[2])
    if window is not None:
        # b h s d -> b s h d
        tensors = [x.transpose(1, 2) for x in (dout, q, k, v, out)]
        grads = aten._flash_attention_backward(
            *tensors, lse, None, None, *lengths, 0.0, causal, seed, offset, scale=scale, **_limits(window)
        )
        dq, dk, dv = (grad.transpose(1, 2) for grad in grads)
        return dq, dk, dv
    return aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse, None, None, *lengths, 0.0, causal, seed, offset, scale=scale
    )


def _limits(window: Window) -> dict[str, int | None]:
    left, right = window
    return {"window_size_left": left, "window_size_right": right}


INPUTS = "query key value".split()
SAVED = ["grad_out", *INPUTS, "out", "logsumexp"]
LENGTHS = "cum_seq_q cum_seq_k max_q max_k".split()
POSITIONAL = {
    "_scaled_dot_product_flash_attention_for_cpu": [*INPUTS, "dropout_p", "is_causal"],
    "_scaled_dot_product_flash_attention_for_cpu_backward": [*SAVED, "dropout_p", "is_causal"],
    "_scaled_dot_product_flash_attention": [*INPUTS, "dropout_p", "is_causal", "return_debug_mask"],
    "_scaled_dot_product_flash_attention_backward": [
        *SAVED, *LENGTHS, "dropout_p", "is_causal", "philox_seed", "philox_offset",
    ],
    "_scaled_dot_product_cudnn_attention": [
        *INPUTS, "attn_bias", "compute_log_sumexp", "dropout_p", "is_causal", "return_debug_mask",
    ],
    "_scaled_dot_product_cudnn_attention_backward": [
        *SAVED, "philox_seed", "philox_offset", "attn_bias", *LENGTHS, "dropout_p", "is_causal",
    ],
    "_flash_attention_forward": [*INPUTS, *LENGTHS, "dropout_p", "is_causal", "return_debug_mask"],
    "_flash_attention_backward": [*SAVED, *LENGTHS, "dropout_p", "is_causal", "rng_state", "unused"],
}  # fmt: skip
"""The order in which the ops are called; scale, and the limits of a window, go by name."""


# one for each kind of device
@lru_cache(4)
def other_schema(device: str) -> str | None:
    """Return which of torch's ops is not called the way it wants, or None."""
    for name, expected in POSITIONAL.items():
        if (device == "cpu") == name.removesuffix("_backward").endswith("_for_cpu"):
            packet = getattr(aten, name, None)
            found = [] if packet is None else positional(str(packet.default._schema))
            if found != expected:
                what = f"takes {', '.join(found)}" if found else "is missing"
                return f"knows another {name} than that of torch {torch.__version__}, which {what}"
    return None


def positional(schema: str) -> list[str]:
    """Return the names of an op's positional arguments, in order."""
    arguments = torch._C.parse_schema(schema).arguments
    return [argument.name for argument in arguments if not argument.kwarg_only]


class _Cudnn:
    """The cuDNN op; torch versions differ in whether its lse ends in a dim of one, so the forward's is remembered."""

    def __init__(self) -> None:
        self._lse_dims: int | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
        self._lse_dims = lse.ndim
        return out, lse.reshape(q.shape[:3])

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
    ) -> Gradients:
        if self._lse_dims is None:
            self.forward(q, k, v, scale, causal)
        lse = lse.contiguous() if self._lse_dims == 3 else lse.contiguous().unsqueeze(-1)
        seed = q.new_empty((), dtype=torch.int64)
        lengths = (q.shape[2], k.shape[2])
        return aten._scaled_dot_product_cudnn_attention_backward(
            _laid_out_as(dout, out), q, k, v, out, lse, seed, seed, None, None, None, *lengths, 0.0, causal, scale=scale
        )


def _laid_out_as(x: Tensor, other: Tensor) -> Tensor:
    # before cuDNN 9.5.1 the op warns when the strides differ
    if x.stride() == other.stride():
        return x
    return torch.empty_strided(x.shape, other.stride(), dtype=x.dtype, device=x.device).copy_(x)


def expanded(op: Op) -> Op:
    """`op`, which knows no grouped heads, with each KV head repeated for its query heads and the gradients summed."""

    def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        return op.forward(q, *_repeated(q, k, v), scale, causal)

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
    ) -> Gradients:
        dq, dk, dv = op.backward(dout, q, *_repeated(q, k, v), out, lse, scale, causal)
        return dq, _summed(dk, k), _summed(dv, v)

    return Op(op.name, forward, backward)


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    times = q.shape[1] // k.shape[1]
    return (k, v) if times == 1 else (k.repeat_interleave(times, 1), v.repeat_interleave(times, 1))


def _summed(gradient: Tensor, like: Tensor) -> Tensor:
    if gradient.shape == like.shape:
        return gradient
    wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    return gradient.unflatten(1, (like.shape[1], -1)).sum(2, dtype=wide).to(gradient.dtype)


def reproducible(op: Op) -> Op:
    """`op` with a backward equal bit for bit from call to call: torch's global switch is on while it runs."""

    def backward(*call: Any) -> Gradients:
        with _deterministic_algorithms():
            return op.backward(*call)

    return op._replace(backward=backward)


@contextmanager
def _deterministic_algorithms() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


CPU_FLASH = Op("CPU flash", _cpu_forward, _cpu_backward)
CUDA_FLASH = Op("flash", _flash_forward, _flash_backward, windows=True)


def cudnn() -> Op:
    op = _Cudnn()
    return Op("cuDNN", op.forward, op.backward)


def cpu_flash(version: str) -> Op:
    """Return the CPU op of this torch version; before 2.9 it knows no grouped heads (pytorch/pytorch#157893)."""
    major, minor = (int(part) for part in version.split(".")[:2])
    return CPU_FLASH if (major, minor) >= (2, 9) else expanded(CPU_FLASH)
