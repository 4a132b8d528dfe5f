"""Kernels and merges against the reference, and their speed at the shapes that a rank's tiles have."""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from gpu_check.measure import error_of, seconds
from gpu_check.table import Row
from megatron_cp.context.dropout import DropoutSeed, labelled
from megatron_cp.context.merge import SoftmaxMerge, Sum
from megatron_cp.context.merging import ASSUMED, BY_TORCH, SEVERAL
from megatron_cp.kernels import KERNELS, Kernel, choose
from megatron_cp.kernels.reference import ReferenceKernel
from megatron_cp.kernels.triton_flash import TritonKernel

BOUND = {torch.bfloat16: 1e-2, torch.float32: 2e-6}


class Tile(NamedTuple):
    """One kernel call: tokens of queries and keys, query and KV heads, head dim."""

    queries: int
    keys: int
    heads: int
    groups: int
    dim: int
    causal: bool

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        return f"{self.queries} x {self.keys}, heads {self.heads}/{self.groups}, dim {self.dim}, {mask}"


# one odd length of each kind, every head dim that models have, grouped heads; the whole of a block and a part
CHECKED = [
    *(Tile(513, 513, 8, 2, dim, True) for dim in (64, 96, 100, 128, 192, 256)),
    *(Tile(queries, 513, 8, 2, 128, False) for queries in (1, 130, 513)),
    Tile(1024, 1024, 8, 8, 128, True),
    Tile(512, 1024, 8, 1, 128, False),
    Tile(1024, 512, 4, 2, 64, False),
]

# with dropped weights: errors of the small ones, times of the large one; a kernel is compiled for each head dim
DROPPED = [
    *(Tile(513, 513, 8, 2, dim, True) for dim in (64, 128, 256)),
    Tile(130, 513, 8, 2, 128, False),
    Tile(16384, 16384, 32, 8, 128, True),
]
RATE = 0.1


def dtype_on(device: str) -> torch.dtype:
    """Return the dtype in which a run computes attention on such a device."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def available(device: str, dim: int) -> Iterator[tuple[str, Kernel]]:
    """Yield the kernels that can run here, on CUDA each op of torch's kernel by itself."""
    dtype = str(dtype_on(device)).removeprefix("torch.")
    for entry in KERNELS:
        if entry.name == "reference" or entry.to_drop:
            continue
        try:
            yield entry.name, choose(entry.name, device=device, dtype=dtype, head_dim=dim)[0]
        except (ValueError, RuntimeError):
            continue
    if device == "cuda":
        from megatron_cp.kernels.aten import CUDA_FLASH, cudnn
        from megatron_cp.kernels.fused import FusedKernel, Only

        yield from ((f"torch's {op.name}", FusedKernel(op.name, Only(op))) for op in (CUDA_FLASH, cudnn()))


def inputs(tile: Tile, device: str) -> list[Tensor]:
    """Make dout, q, k, v: slices of something larger, as a rank's tiles are."""
    generator = torch.Generator(device).manual_seed(0)
    sizes = [(tile.queries, tile.heads), (tile.queries, tile.heads), (tile.keys, tile.groups), (tile.keys, tile.groups)]
    made = (torch.randn(s, 1, 2 * h, tile.dim, generator=generator, device=device) for s, h in sizes)
    return [x.to(dtype_on(device))[:, :, : x.shape[2] // 2] for x in made]


def both(kernel: Kernel, tile: Tile, dout: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Return out, lse, dq, dk, dv."""
    how = {"scale": tile.dim**-0.5, "causal": tile.causal}
    out, lse = kernel.forward(q, k, v, **how)
    return out, lse, *kernel.backward(dout, q, k, v, out, lse, **how)


def against_reference(device: str) -> Iterator[Row]:
    """Compare every kernel with the reference in float64."""
    bound = BOUND[dtype_on(device)]
    for tile in CHECKED:
        dout, q, k, v = inputs(tile, device)
        expected = both(ReferenceKernel(), tile, *(x.double() for x in (dout, q, k, v)))
        for name, kernel in available(device, tile.dim):
            case = f"{name}, {tile}"
            try:
                found = both(kernel, tile, dout, q, k, v)
            except RuntimeError as error:
                yield Row(case, {"": f"refused: {str(error).splitlines()[0][:120]}"}, "left out")
                continue
            names = ("out", "lse", "dq", "dk", "dv")
            errors = {what: error_of(a, b) for what, a, b in zip(names, found, expected, strict=True)}
            # not > : NaN is an error too
            yield Row(case, errors, "ok" if max(errors.values()) <= bound else "wrong")


def rates(device: str) -> Iterator[Row]:
    """Measure TFLOP/s at the shapes of the tiles of eight ranks: s x s/2, s/2 x s, and s x s under a causal mask."""
    tokens, heads, groups, dim = ((4096, 16384), 32, 8, 128) if device == "cuda" else ((256, 512), 4, 2, 64)
    for s in tokens:
        for tile in (
            Tile(s, s // 2, heads, groups, dim, False),
            Tile(s // 2, s, heads, groups, dim, False),
            Tile(s, s, heads, groups, dim, True),
        ):
            dout, q, k, v = inputs(tile, device)
            how = {"scale": dim**-0.5, "causal": tile.causal}
            flops = 4e-12 * tile.queries * tile.keys * heads * dim / (2 if tile.causal else 1)
            for name, kernel in available(device, dim):
                forward, backward = partial(kernel.forward, q, k, v, **how), partial(kernel.backward, dout, q, k, v)
                try:
                    taken = [seconds(device, forward), seconds(device, partial(backward, *forward(), **how))]
                except RuntimeError as error:
                    yield Row(f"{name}, {tile}", {"": str(error).splitlines()[0][:120]}, "left out")
                    continue
                figures = {"forward ms": taken[0] * 1e3, "backward ms": taken[1] * 1e3}
                rate = {"forward TFLOP/s": flops / taken[0], "backward TFLOP/s": 2.5 * flops / taken[1]}
                held = workspace(device, partial(backward, *forward(), **how))
                yield Row(f"{name}, {tile}", figures | rate | held)


def dropped(device: str) -> Iterator[Row]:
    """Compare the kernel that drops weights with the reference in float64, which drops the same ones, and measure it.

    On a CPU it runs by Triton's interpreter.
    """
    if device == "cpu":
        # read when Triton is imported, which is at the first call
        os.environ["TRITON_INTERPRET"] = "1"
    kernel = TritonKernel(RATE)
    for tile in DROPPED if device == "cuda" else [Tile(40, 70, 4, 2, 24, False)]:
        dout, q, k, v = inputs(tile, device)
        q, _ = labelled(q, q, (range(tile.queries),), DropoutSeed(1))
        _, k = labelled(k, k, (range(tile.keys),), DropoutSeed(1))
        case = f"{kernel.name}, {tile}, rate {RATE}"
        if tile.keys <= 1024:
            expected = both(ReferenceKernel(dropout=RATE), tile, *(x.double() for x in (dout, q, k, v)))
            found, names = both(kernel, tile, dout, q, k, v), ("out", "lse", "dq", "dk", "dv")
            errors = {what: error_of(a, b) for what, a, b in zip(names, found, expected, strict=True)}
            yield Row(case, errors, "ok" if max(errors.values()) <= BOUND[q.dtype] else "wrong")
            continue
        how = {"scale": tile.dim**-0.5, "causal": tile.causal}
        forward, backward = partial(kernel.forward, q, k, v, **how), partial(kernel.backward, dout, q, k, v)
        taken = [seconds(device, forward), seconds(device, partial(backward, *forward(), **how))]
        yield Row(case, {"forward ms": taken[0] * 1e3, "backward ms": taken[1] * 1e3})


def workspace(device: str, call: Callable[[], Sequence[Tensor]]) -> dict[str, float]:
    """Return the memory that a call takes beside its inputs and results; a GPU's allocator counts it."""
    if device != "cuda":
        return {}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = call()
    torch.cuda.synchronize()
    made = sum(x.untyped_storage().nbytes() for x in results)
    return {"backward's workspace MiB": (torch.cuda.max_memory_allocated() - before - made) / 2**20}


def merges(device: str) -> Iterator[Row]:
    """Compare merges of partial results and sums of gradients with float64, and measure them.

    On a GPU by torch and by the fused kernel, two and eight at a time.
    """
    tokens, heads, dim = (16384, 32, 128) if device == "cuda" else (512, 4, 64)
    dtype, generator = dtype_on(device), torch.Generator(device).manual_seed(0)
    size = (tokens, 1, heads, dim)
    outs = [torch.randn(size, generator=generator, device=device).to(dtype) for _ in range(8)]
    lses = [torch.randn(size[:3], generator=generator, device=device) for _ in range(8)]
    # rows that no result has seen a key for, and rows that only the first one has
    for place, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        none = slice(0, 4 if place == 0 else 8)
        out[none], lse[none] = 0, -torch.inf
    for way, count in product((BY_TORCH, SEVERAL) if device == "cuda" else (BY_TORCH,), (2, 8)):
        assumed = ASSUMED.set(way)
        try:
            yield from _merges(device, "one kernel" if way.fused else "torch", outs[:count], lses[:count])
        finally:
            ASSUMED.reset(assumed)


def _merges(device: str, name: str, outs: list[Tensor], lses: list[Tensor]) -> Iterator[Row]:
    """The error and the bandwidth of a merge and of a sum of these."""
    rows, bound = slice(0, len(outs[0])), BOUND[outs[0].dtype]

    def merged() -> Tensor:
        merge = SoftmaxMerge(outs[0])
        for out, lse in zip(_taken_over(outs), _taken_over(lses), strict=True):
            merge.add(rows, out, lse)
        return merge.result()[0]

    def added() -> Tensor:
        total = Sum(outs[0])
        for out in _taken_over(outs):
            total.add(rows, out)
        return total.result()

    weights = torch.stack(lses).double().softmax(0).nan_to_num()[..., None]
    expected = sum(weight * out.double() for weight, out in zip(weights, outs, strict=True))
    sums = sum(out.double() for out in outs)
    size = sum(out.numel() * out.element_size() for out in outs)
    for what, call, right in (("results", merged, expected), ("gradients", added, sums)):
        error = error_of(call(), right)
        took = seconds(device, call)
        figures = {"error": error, "ms": took * 1e3, "GB/s of what is read": size / took / 1e9}
        case = f"{len(outs)} {what} {list(outs[0].shape)} by {name}"
        yield Row(case, figures, "ok" if error <= bound else "wrong")


def _taken_over(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors, the first one as a copy where it is taken over and added to in place."""
    first, *rest = tensors
    return [first.clone() if first.dtype == torch.float32 else first, *rest]
