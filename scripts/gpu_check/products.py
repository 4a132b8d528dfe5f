"""Stream-K's matrix product beside torch's own: errors, and speed where the last wave of tiles is nearly empty."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from gpu_check.measure import error_of, seconds
from gpu_check.table import Row
from megatron_cp.kernels.stream_k_plan import HALF, SINGLE, StreamTiling, cut, predict

BOUND = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
CALLS = 10
"""Calls between two marks, so that launches are hidden behind kernels."""

SMALLER = (StreamTiling((128, 128, 64), warps=4, stages=4), StreamTiling((128, 128, 64), warps=8, stages=3))
ON_CPU = StreamTiling((16, 16, 16), group=2)


class Size(NamedTuple):
    """Sizes of [m, k] times [k, n]."""

    m: int
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.m} x {self.n} x {self.k}"


# tiles of 128 x 256 on 132 processors: 0.24, 0.55, 0.97, 1.16, 1.23, 2.18, 3.88, 4.91 and 5.47 waves
SQUARES = [Size(1024, 1024, 32768), *(Size(m, m, 8192) for m in (1536, 2048, 2176, 2304, 3072, 4096, 4608, 4864))]
# a rank's piece of tokens in a ring of eight; the gradient of a key projection
LINEARS = [Size(1024, 3584, 8192), Size(1024, 8192, 32768)]


def factors(size: Size, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Make x [m, k] and the transpose of W [n, k], as a linear's forward multiplies them."""
    made = torch.Generator(device).manual_seed(0)
    x, w = (torch.randn(rows, size.k, generator=made, device=device).to(dtype) for rows in size[:2])
    return x, w.t()


def stream_k(device: str) -> Iterator[Row]:
    """Compare the kernel with float64, then with torch's product in time; on a CPU by Triton's interpreter."""
    if device == "cpu":
        # read when Triton is imported, which is below
        os.environ["TRITON_INTERPRET"] = "1"
    from megatron_cp.kernels.stream_k import matmul

    if device == "cpu":
        yield from _errors(partial(matmul, programs=4), device, (33, 50, 40), {torch.float32: ON_CPU})
        return
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    call = partial(matmul, programs=processors)
    for size in (*SQUARES, *LINEARS):
        yield _timed(call, size, [HALF], processors)
    yield from _errors(call, device, (1664, 2304, 1024), {torch.bfloat16: HALF, torch.float32: SINGLE})
    yield from _errors(call, device, (1111, 777, 1000), {torch.bfloat16: HALF})
    for size in SQUARES[1:4]:
        yield _timed(call, size, SMALLER, processors)


def _errors(
    matmul: Callable[..., Tensor], device: str, sizes: tuple[int, int, int], tilings: dict[torch.dtype, StreamTiling]
) -> Iterator[Row]:
    """The products of a linear: y = x W^T, dx = dy W and dW = dy^T x."""
    for dtype, tiling in tilings.items():
        x, w = factors(Size(*sizes), dtype, device)
        dy = (x @ w).contiguous()
        for name, a, b in (("x W^T", x, w), ("dy W", dy, w.t()), ("dy^T x", dy.t(), x)):
            error = error_of(matmul(a, b, tiling=tiling), a.double() @ b.double())
            case = f"{name}, {a.shape[0]} x {b.shape[1]} x {a.shape[1]}, {str(dtype).removeprefix('torch.')}"
            yield Row(case, {"error": error}, "ok" if error <= BOUND[dtype] else "wrong")


def _timed(
    matmul: Callable[..., Tensor], size: Size, tilings: list[StreamTiling] | tuple[StreamTiling, ...], count: int
) -> Row:
    a, b = factors(size, torch.bfloat16, "cuda")
    flops = 2e-12 * size.m * size.n * size.k

    def rate(call: Callable[[], Tensor]) -> float:
        return flops * CALLS / seconds("cuda", lambda: [call() for _ in range(CALLS)])

    expected = torch.matmul(a, b)
    figures: dict[str, str | float | int] = {"torch TFLOP/s": rate(partial(torch.matmul, a, b))}
    worst = 0.0
    for tiling in tilings:
        name = " x ".join(map(str, tiling.block))
        worst = max(worst, error_of(matmul(a, b, tiling=tiling), expected))
        prediction, plan = predict(*size, tiling, count), cut(*size, tiling.block, count)
        figures |= {
            f"Stream-K TFLOP/s ({name}, {tiling.warps} warps)": rate(partial(matmul, a, b, tiling=tiling)),
            "waves": prediction.waves,
            "shared tiles": plan.shared,
            "predicted full by tiles": prediction.by_tiles,
            "by Stream-K": prediction.by_stream,
            "choice": "stream-k" if prediction.pays else "torch",
        }
    return Row(str(size), {**figures, "error": worst}, "ok" if worst <= BOUND[torch.bfloat16] else "wrong")
