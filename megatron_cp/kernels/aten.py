"""torch's fused attention ops that hand out the logsumexp and take it back, brought to one calling convention.

All of it is in `b h s d` with lse `b h s`, where `s b h d` tensors arrive as permuted views, without a copy.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten


class Op(NamedTuple):
    """A fused op: forward(q, k, v, scale, causal) and backward(dout, q, k, v, out, lse, scale, causal)."""

    name: str
    forward: Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor, Tensor]]


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def _cpu_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, out, lse, 0.0, causal, scale=scale)


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return out, lse


def _flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    # the kernel reads lse through a bare pointer as b h s; the random state is read with dropout only
    state = torch.empty(2, dtype=torch.uint64, device=q.device)
    return aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal, state, state[:1],
        scale=scale,
    )  # fmt: skip


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return out, lse.reshape(q.shape[:3])


def _cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    # the op warns and copies when the two differ in layout
    matching = dout if dout.stride() == out.stride() else torch.empty_strided(
        out.shape, out.stride(), dtype=dout.dtype, device=dout.device
    ).copy_(dout)  # fmt: skip
    seed = torch.empty((), dtype=torch.int64, device=q.device)
    return aten._scaled_dot_product_cudnn_attention_backward(
        matching, q, k, v, out, lse.contiguous(), seed, seed, None, None, None, q.shape[2], k.shape[2], 0.0, causal,
        scale=scale,
    )  # fmt: skip


def expanded(op: Op) -> Op:
    """`op`, which knows no grouped heads, with every KV head repeated for its query heads and their gradients summed."""

    def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        return op.forward(q, *_repeated(q, k, v), scale, causal)

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
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
    return gradient.unflatten(1, (like.shape[1], -1)).sum(2, dtype=wide).to(like.dtype)


CPU_FLASH = Op("CPU flash", _cpu_forward, _cpu_backward)
CUDA_FLASH = Op("flash", _flash_forward, _flash_backward)
CUDNN = Op("cuDNN", _cudnn_forward, _cudnn_backward)


def cpu_flash() -> Op:
    """The CPU op; before torch 2.9 it reads past the KV heads when there are fewer of them than query heads."""
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    return CPU_FLASH if (major, minor) >= (2, 9) else expanded(CPU_FLASH)
