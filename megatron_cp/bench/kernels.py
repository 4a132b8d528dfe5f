"""Check each kernel against the reference on one device, then time it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_cp.bench.comparison import DTYPES, AttentionShape
from megatron_cp.kernels import AUTO, KERNELS, Kernel, choose
from megatron_cp.kernels.aten import CUDA_FLASH, cudnn
from megatron_cp.kernels.fused import FusedKernel, Only
from megatron_cp.kernels.reference import ReferenceKernel

LARGEST_ERROR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Relative deviation from the float64 reference (Frobenius norm) up to which a kernel counts as correct."""

CHECKED_TOKENS = 1024
"""The reference needs the whole score matrix; this long a sequence already takes every kernel through many blocks."""

SCORE_BYTES = 2 << 30
"""The largest score matrix that the reference is timed with."""

BACKWARD_OVER_FORWARD = 2.5
"""Five matrix products instead of two (Dao 2023, section 4.1)."""


@dataclass(frozen=True, kw_only=True)
class KernelResult:
    """One kernel's figures at one length: best milliseconds, TFLOP/s (a causal mask counts as half), relative error.

    skipped: reason why there are no figures
    """

    kernel: str
    seq: int
    forward_ms: float | None = None
    backward_ms: float | None = None
    forward_tflops: float | None = None
    backward_tflops: float | None = None
    error: float | None = None
    skipped: str | None = None


@dataclass(frozen=True, kw_only=True)
class KernelReport:
    """All figures of a run, with the machine, the kernel that auto takes there and the torch kernel's op per shape."""

    rows: list[KernelResult]
    device: str
    torch: str
    auto: str
    choices: list[str]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Inputs(NamedTuple):
    """One attention and the gradient of its output, `s b h d` and `s b g d`."""

    dout: Tensor
    q: Tensor
    k: Tensor
    v: Tensor


def bench(names: Sequence[str], shapes: Sequence[AttentionShape], device: str, rounds: int) -> KernelReport:
    """Check and time the kernels of these names, on CUDA also each op that the torch kernel chooses from.

    Raises ValueError for a kernel that cannot run the shape, RuntimeError for a missing device or package and for a
    kernel that disagrees with the reference: then there are no figures at all.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("no CUDA device is visible; use --device cpu")
    kernels = _kernels(names, shapes[0], device)
    errors = {name: check(kernel, shapes[0], device) for name, kernel in kernels.items()}
    rows = [
        _row(name, kernel, shape, device, rounds, errors[name]) for shape in shapes for name, kernel in kernels.items()
    ]
    choices = [line for kernel in kernels.values() if isinstance(kernel, FusedKernel) for line in kernel.report()]
    auto = choose(AUTO, device=device, dtype=shapes[0].dtype, head_dim=shapes[0].head_dim)[1]
    where = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return KernelReport(rows=rows, device=where, torch=torch.__version__, auto=auto, choices=choices)


def check(kernel: Kernel, shape: AttentionShape, device: str) -> float:
    """Return the kernel's error in out and gradients against the float64 reference.

    Raises RuntimeError above the bound of the dtype.
    """
    inputs = make_inputs(shape, min(shape.seq, CHECKED_TOKENS), device)
    found = _both(kernel, inputs, shape.causal)
    expected = _both(ReferenceKernel(), Inputs(*(x.double() for x in inputs)), shape.causal)
    pairs = zip(("out", "dq", "dk", "dv"), found, expected, strict=True)
    errors = {name: float((a - b).norm() / b.norm()) for name, a, b in pairs}
    worst, bound = max(errors, key=lambda name: errors[name]), LARGEST_ERROR[DTYPES[shape.dtype]]
    # not <= : NaN is an error too
    if not errors[worst] <= bound:
        raise RuntimeError(
            f"kernel {kernel.name!r} is wrong on {device}: {worst} deviates from the reference by {errors[worst]:.1e}, "
            f"{shape.dtype} allows {bound:.0e}; no figures for a wrong kernel"
        )
    return errors[worst]


def make_inputs(shape: AttentionShape, tokens: int, device: str) -> Inputs:
    """Return random inputs of this shape, equal on every call."""
    generator = torch.Generator(device).manual_seed(0)
    sizes = [
        (tokens, shape.batch, n, shape.head_dim) for n in (shape.heads, shape.heads, shape.kv_heads, shape.kv_heads)
    ]
    return Inputs(*(torch.randn(s, generator=generator, device=device).to(DTYPES[shape.dtype]) for s in sizes))


def flops(shape: AttentionShape) -> float:
    """Return the floating-point operations of the forward pass."""
    whole = 4.0 * shape.batch * shape.heads * shape.head_dim * shape.seq**2
    return whole / 2 if shape.causal else whole


def _kernels(names: Sequence[str], shape: AttentionShape, device: str) -> dict[str, Kernel]:
    how: dict[str, Any] = {"device": device, "dtype": shape.dtype, "head_dim": shape.head_dim}
    if names:
        kernels = {KERNELS.get(name).name: choose(name, **how)[0] for name in names}
    else:
        kernels = {entry.name: kernel for entry in KERNELS if (kernel := _if_able(entry.name, how))}
    if device == "cuda" and "torch" in kernels:
        kernels |= {f"torch: {op.name}": FusedKernel(op.name, Only(op)) for op in (CUDA_FLASH, cudnn())}
    return kernels


def _if_able(name: str, how: dict[str, Any]) -> Kernel | None:
    try:
        return choose(name, **how)[0]
    except (ValueError, RuntimeError):
        return None


def _row(name: str, kernel: Kernel, shape: AttentionShape, device: str, rounds: int, error: float) -> KernelResult:
    needed = shape.batch * shape.heads * shape.seq**2 * 4
    if isinstance(kernel, ReferenceKernel) and needed > SCORE_BYTES:
        return KernelResult(kernel=name, seq=shape.seq, skipped=f"a score matrix of {needed / 2**30:.0f} GiB")
    dout, q, k, v = make_inputs(shape, shape.seq, device)
    how: dict[str, Any] = {"scale": shape.head_dim**-0.5, "causal": shape.causal}
    out, lse = kernel.forward(q, k, v, **how)
    forward = best_seconds(lambda: kernel.forward(q, k, v, **how), device, rounds)
    backward = best_seconds(lambda: kernel.backward(dout, q, k, v, out, lse, **how), device, rounds)
    rate = flops(shape) / 1e12
    return KernelResult(
        kernel=name,
        seq=shape.seq,
        forward_ms=forward * 1e3,
        backward_ms=backward * 1e3,
        forward_tflops=rate / forward,
        backward_tflops=BACKWARD_OVER_FORWARD * rate / backward,
        error=error,
    )


def best_seconds(call: Callable[[], object], device: str, rounds: int) -> float:
    """Return the fastest of `rounds` calls after a warm-up call."""
    call()
    times = []
    for _ in range(rounds):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def _both(kernel: Kernel, inputs: Inputs, causal: bool) -> tuple[Tensor, ...]:
    dout, q, k, v = inputs
    scale = q.shape[3] ** -0.5
    out, lse = kernel.forward(q, k, v, scale=scale, causal=causal)
    return out, *kernel.backward(dout, q, k, v, out, lse, scale=scale, causal=causal)
