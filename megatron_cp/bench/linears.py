"""Time one layer's linears on processes of this machine: engines in turns, forward and backward, correctness first."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_cp.bench.comparison import WrongResultError
from megatron_cp.bench.processes import on_ranks
from megatron_cp.comm import Fabric, largest
from megatron_cp.tensor.axes import engines_over
from megatron_cp.tensor.linear import Linear
from megatron_cp.tensor.place import GridSize
from megatron_cp.tensor.summa_2d import column_linear, row_linear

CLOSE = 1e-4
"""Largest difference between engines, relative to the largest element: they add float32 in another order."""


class LinearBench(NamedTuple):
    """Sizes of the measurement: tokens of the group, hidden size, MLP width, and how often each engine runs."""

    tokens: int
    hidden: int
    ffn: int
    rounds: int


class EngineTimes(NamedTuple):
    """Seconds of each round of an engine, the slowest rank's.

    computing: seconds that a rank's process computed meanwhile, on all of its threads
    """

    engine: str
    seconds: tuple[float, ...]
    computing: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """Fastest and slowest round."""
        return min(self.seconds), max(self.seconds)

    def over(self, other: "EngineTimes") -> list[float]:
        """Return the time of each round over that of another engine in the same round."""
        return [mine / its for mine, its in zip(self.seconds, other.seconds, strict=True)]


def measure_linears(ranks: int, size: GridSize, engines: Sequence[str], bench: LinearBench) -> list[EngineTimes]:
    """Return the times of each engine over the same grid; raises RuntimeError where their results differ."""
    return on_ranks(ranks, measure, size, tuple(engines), bench)[0]


def measure(
    fabric: Fabric, device: torch.device, size: GridSize, engines: Sequence[str], bench: LinearBench
) -> list[EngineTimes]:
    """Return the times on one rank, equal on all; raises WrongResultError where results differ."""
    return in_turns(
        fabric, device, {name: _Layer(fabric, device, size, name, bench).run for name in engines}, bench.rounds
    )


def in_turns(
    fabric: Fabric, device: torch.device, runs: Mapping[str, Callable[[], Sequence[Tensor]]], rounds: int
) -> list[EngineTimes]:
    """Return the times of each way to the same result; raises WrongResultError where results differ from the first's.

    runs: by name, what each rank calls; all ranks name the same in the same order
    """
    names = list(runs)
    first = runs[names[0]]()
    for name, run in runs.items():
        for found, expected in zip(run(), first, strict=True):
            if expected.numel() and float((found - expected).abs().max()) > CLOSE * float(expected.abs().max()):
                raise WrongResultError(f"engine {name} differs from {names[0]}")
    times: dict[str, list[list[float]]] = {name: [] for name in names}
    for number in range(rounds):
        # each goes first in every other round
        for name in names if number % 2 == 0 else names[::-1]:
            # all have arrived when it returns
            largest(fabric, device)
            began = time.perf_counter(), time.process_time()
            runs[name]()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            took = time.perf_counter() - began[0], time.process_time() - began[1]
            times[name].append(largest(fabric, device, *took))
    return [EngineTimes(name, *zip(*each, strict=True)) for name, each in times.items()]


class _Layer:
    """The four linears of a layer with their tensors on one rank."""

    def __init__(self, fabric: Fabric, device: torch.device, size: GridSize, engine: str, bench: LinearBench) -> None:
        p, made = fabric.size, engines_over(fabric, size, engine)
        local, seen = bench.tokens // p, bench.tokens // size.weights
        generator = torch.Generator().manual_seed(fabric.rank)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        self._calls: list[tuple[Linear, Tensor, Tensor, Tensor]] = []
        for inputs, outputs in ((bench.hidden, 3 * bench.hidden), (bench.hidden, 2 * bench.ffn)):
            column = column_linear(*made), draw(local, inputs), draw(outputs // p, inputs)
            self._calls.append((*column, draw(seen, outputs // size.tokens)))
        for inputs, outputs in ((bench.hidden, bench.hidden), (bench.ffn, bench.hidden)):
            row = row_linear(*made), draw(seen, inputs // size.tokens), draw(outputs, inputs // p)
            self._calls.append((*row, draw(local, outputs)))

    def run(self) -> list[Tensor]:
        """Return outputs and gradients of all four."""
        results: list[Tensor] = []
        for linear, x, weight, dy in self._calls:
            results += [linear.forward(x, weight), *linear.backward(dy, x, weight)]
        return results
