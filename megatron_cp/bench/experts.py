"""Time the gated experts of one rank: each product in turns with experts one by one, correctness first."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from megatron_cp.bench.comparison import WrongResultError
from megatron_cp.experts import PRODUCTS
from megatron_cp.experts.choose import ChosenProduct, choose
from megatron_cp.experts.function import GroupedCall, grouped_linear
from megatron_cp.experts.grouped_mm import lacking, misaligned
from megatron_cp.experts.load import zipf
from megatron_cp.experts.product import GroupedProduct, groups_of

APART = "one by one"
"""The experts that the products are compared with: Megatron's way, without the time of its modules."""

CLOSE = {"float64": 1e-12, "float32": 1e-4, "bfloat16": 2e-2}
"""Largest difference from the experts one by one, relative to the largest element."""


class ExpertBench(NamedTuple):
    """Sizes of the measurement: experts and rows of a rank, hidden size and width of an expert, Zipf's exponent."""

    experts: int
    rows: int
    hidden: int
    ffn: int
    skew: float
    dtype: str
    rounds: int


class ProductTimes(NamedTuple):
    """Seconds of each round of a product, forward and backward."""

    product: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """Fastest and slowest round."""
        return min(self.seconds), max(self.seconds)


def measure(bench: ExpertBench, device: str) -> tuple[list[ProductTimes], ChosenProduct]:
    """Return the times of the experts one by one and of each product that can run, and what `auto` takes.

    Raises WrongResultError, with nothing timed, where a product's results differ.
    """
    layer, dtype = _RankExperts(bench, device), getattr(torch, bench.dtype)
    widths = (bench.hidden, bench.ffn)
    able = [
        one
        for one in PRODUCTS
        if not (one.needs != "nothing" and (misaligned(widths, dtype) or lacking(device, dtype)))
    ]
    runs: dict[str, Callable[[], Sequence[Tensor]]] = {APART: layer.apart}
    for entry in able:
        product = entry.load()()
        runs[entry.name] = lambda product=product: layer.together(product)  # type: ignore[misc]
    expected = layer.apart()
    for name, run in runs.items():
        for found, each in zip(run(), expected, strict=True):
            if float((found - each).abs().max()) > CLOSE[bench.dtype] * float(each.abs().max()):
                raise WrongResultError(f"product {name} differs from experts {APART}")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(bench.rounds):
        for name, run in runs.items():
            times[name].append(_timed(run, device))
    return [ProductTimes(name, tuple(seconds)) for name, seconds in times.items()], choose(
        "auto", device, dtype, widths
    )


def _timed(run: Callable[[], object], device: str) -> float:
    began = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


class _RankExperts:
    """The gated experts of one rank with their tokens, probabilities and an output gradient."""

    def __init__(self, bench: ExpertBench, device: str) -> None:
        generator, dtype = torch.Generator().manual_seed(0), getattr(torch, bench.dtype)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        self._sizes = zipf(bench.experts, bench.rows, bench.skew)
        self._groups = groups_of(self._sizes, torch.device(device))
        self._x, self._gradient = draw(bench.rows, bench.hidden).requires_grad_(), draw(bench.rows, bench.hidden)
        self._probs = torch.rand(bench.rows, 1, generator=generator).to(device, dtype).requires_grad_()
        self._first = tuple(
            (draw(2 * bench.ffn, bench.hidden) / bench.hidden**0.5).requires_grad_() for _ in self._sizes
        )
        self._second = tuple((draw(bench.hidden, bench.ffn) / bench.ffn**0.5).requires_grad_() for _ in self._sizes)

    def apart(self) -> Sequence[Tensor]:
        """Return output and gradients of the experts one by one."""
        parts = zip(self._x.split(self._sizes), self._probs.split(self._sizes), self._first, self._second, strict=True)
        return self._with_gradients(
            torch.cat([functional.linear(_gated(functional.linear(x, w), p), v) for x, p, w, v in parts])
        )

    def together(self, product: GroupedProduct) -> Sequence[Tensor]:
        """Return output and gradients with one product for each linear of all experts."""
        inner = grouped_linear(GroupedCall(product, self._groups, self._first), self._x)
        call = GroupedCall(product, self._groups, self._second)
        return self._with_gradients(grouped_linear(call, _gated(inner, self._probs)))

    def _with_gradients(self, output: Tensor) -> Sequence[Tensor]:
        inputs = (self._x, self._probs, *self._first, *self._second)
        return output.detach(), *torch.autograd.grad(output, inputs, self._gradient)


def _gated(x: Tensor, probs: Tensor) -> Tensor:
    gate, value = x.chunk(2, -1)
    return functional.silu(gate) * value * probs
