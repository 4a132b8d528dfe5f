"""Compare our pipeline schedules with Megatron's own on one GPT, in the same processes, in alternating steps."""

import gc
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from megatron_cp.bench.activations import LiveActivations
from megatron_cp.bench.comparison import WrongResultError
from megatron_cp.bench.pipeline import ActionRecorder, GptSize, Line, MeasuredSchedule, Pairs
from megatron_cp.bench.processes import on_ranks
from megatron_cp.comm import Fabric, largest
from megatron_cp.errors import CannotRun
from megatron_cp.megatron.rebind import replace, restore_all
from megatron_cp.pipeline import SCHEDULES
from megatron_cp.pipeline.action import FORWARD, FULL, Action
from megatron_cp.pipeline.build import build
from megatron_cp.pipeline.execute import Observe

if TYPE_CHECKING:
    from megatron_cp.megatron.bench.model import ModelChunks
    from megatron_cp.megatron.bench.overhead import Overhead

ROUNDING = 1e-5
"""Largest difference of gradients that are summed in two halves, over the largest gradient."""

BASELINES = {False: "Megatron's 1F1B", True: "Megatron's interleaved"}


Key = tuple[int, int, str]


class ScheduleGroup(NamedTuple):
    """Schedules of ours to compare with v chunks, at these numbers of microbatches."""

    v: int
    names: tuple[str, ...]
    micros: tuple[int, ...]


class RankSteps(NamedTuple):
    """One rank's steps of one schedule at one number of microbatches, and its activations after each action."""

    lines: list[Line]
    live: list[tuple[Action, int]]


def bench(model: GptSize, groups: Sequence[ScheduleGroup], rounds: int, repeat: int = 1) -> list[Pairs]:
    """Measure on processes of this machine, pinned to cores on a CPU: `rounds` pairs of `repeat` steps each.

    Raises ValueError for what a schedule cannot do, and RuntimeError when losses or gradients differ from those of
    Megatron's own schedule.
    """
    for v, names, micros in groups:
        for name, m in product(names, micros):
            build(name, model.ranks, m, v)
    if 0 < torch.cuda.device_count() < model.ranks:
        raise CannotRun(
            f"{model.ranks} ranks need a GPU each, this machine has {torch.cuda.device_count()}; hide them "
            "with CUDA_VISIBLE_DEVICES= to use the CPU's cores"
        )
    return list(pairs(groups, on_ranks(model.ranks, _compare, model, list(groups), rounds * repeat), repeat))


def pairs(
    groups: Sequence[ScheduleGroup], taken: Sequence[Mapping[Key, RankSteps]], repeat: int = 1
) -> Iterator[Pairs]:
    """Yield what all ranks measured, schedule by schedule."""

    def steps(*key: Any) -> list[list[Line]]:
        return list(map(list, zip(*(mine[key].lines for mine in taken), strict=True)))

    for v, names, micros in groups:
        for name, m in product(names, micros):
            live = [mine[v, m, name].live for mine in taken]
            measured = MeasuredSchedule(build(name, len(taken), m, v), steps(v, m, name), live)
            yield Pairs(measured, BASELINES[v > 1], steps(v, m, BASELINES[v > 1]), repeat)


def overhead(v: int, m: int, hidden: int, seq: int, rounds: int) -> "Overhead":
    """Measure the executor alone, with v modules on one rank; see overhead.py."""
    return on_ranks(1, _overhead, v, m, hidden, seq, rounds)[0]


def _compare(
    fabric: Fabric, device: torch.device, model: GptSize, groups: list[ScheduleGroup], steps: int
) -> dict[Key, RankSteps]:
    _quietly()
    from megatron_cp.megatron.bench.model import ModelChunks, pipeline_of

    found: dict[Key, RankSteps] = {}
    # what a schedule says when it is made stands in the table
    with pipeline_of(model.ranks), redirect_stdout(io.StringIO()):
        for group in groups:
            comparison = ScheduleComparison(fabric, device, ModelChunks(model, group.v), group)
            for m in group.micros:
                comparison.check(m)
                comparison.time(m, steps)
            found |= comparison.taken
    return found


def _overhead(fabric: Fabric, device: torch.device, *sizes: int) -> "Overhead":
    _quietly()
    from megatron_cp.megatron.bench.overhead import measure

    return measure(device, *sizes)


def _quietly() -> None:
    """Silence warnings about what is deprecated in Megatron or not installed."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


class ScheduleComparison:
    """Megatron's own driver and schedules of ours, on the same chunks."""

    def __init__(self, fabric: Fabric, device: torch.device, chunks: "ModelChunks", group: ScheduleGroup) -> None:
        from megatron.core.pipeline_parallel import schedules

        from megatron_cp.megatron.bench.model import TwoCopies
        from megatron_cp.megatron.flags.pipeline import PipelineFlags
        from megatron_cp.megatron.pipeline.schedule import Pipeline
        from megatron_cp.megatron.pipeline.split_linear import bound_queue
        from megatron_cp.megatron.run import Settings

        self._fabric, self._device, self.chunks, self._v = fabric, device, chunks, group.v
        self.observe: Observe = ActionRecorder().observe
        queue = bound_queue()
        assert queue, "pipeline_of installs the hook weight-queue"
        self._queue = queue
        self._baseline = BASELINES[group.v > 1]
        stock = schedules.get_forward_backward_func(fabric.size, group.v if group.v > 1 else None)
        self._functions: dict[str, Callable[..., Any]] = {self._baseline: stock}
        two_pipes = {
            name: Settings(pipeline=PipelineFlags(schedule=name))
            for name in group.names
            if SCHEDULES.get(name).two_copies
        }
        self._functions |= {
            name: Pipeline(name, two_pipes.get(name), lambda action: self.observe(action)) for name in group.names
        }
        copies = TwoCopies(chunks, next(iter(two_pipes.values()))) if two_pipes else chunks
        self._copies = dict.fromkeys(two_pipes, copies)
        self.taken: dict[Key, RankSteps] = {}

    def chunks_of(self, name: str) -> "ModelChunks":
        """Return the chunks that this function trains, with a second copy where its schedule has two pipes."""
        return self._copies.get(name, self.chunks)

    def check(self, m: int) -> None:
        """Run one step of each schedule, check losses and gradients bit for bit, and record activations.

        Gradients of two copies are equal but for rounding.
        """
        expected = self.step(self._baseline, m), self.chunks.gradients
        for name in self._functions:
            chunks = self.chunks_of(name)
            live = LiveActivations(chunks.constants)
            self.observe = live.observe
            with live.counting(self._queue):
                losses, gradients = self.step(name, m), chunks.gradients
            equal = losses == expected[0] and torch.equal(gradients, expected[1])
            if chunks is not self.chunks:
                error = float((gradients - expected[1]).abs().max() / expected[1].abs().max())
                equal = losses == expected[0] and error <= ROUNDING
            (unequal,) = largest(self._fabric, self._device, not equal)
            if unequal:
                raise WrongResultError(f"losses or gradients of {name} at m = {m} differ from {self._baseline}")
            self.taken[self._v, m, name] = RankSteps([], live.after)

    def time(self, m: int, steps: int) -> None:
        """Time the schedules in turns, one after the other and then in reverse order."""
        recorder = ActionRecorder(torch.cuda.synchronize)
        self.observe = recorder.observe
        for turn in range(steps):
            for name in list(self._functions)[:: -1 if turn % 2 else 1]:
                self.step(name, m)
                self.taken[self._v, m, name].lines.append(recorder.take())

    def step(self, name: str, m: int) -> list[float]:
        gc.collect()
        largest(self._fabric, self._device)
        with _observed(self.observe) if name == self._baseline else ExitStack():
            return self.chunks_of(name).step(self._functions[name], m)


@contextmanager
def _observed(observe: Observe) -> Iterator[None]:
    """Observe Megatron's own forwards and backwards, whose stage and microbatch are not known."""

    def around(kind: str) -> Callable[[Any], Any]:
        def make(old: Callable[..., Any]) -> Callable[..., Any]:
            def observed(*args: Any, **kwargs: Any) -> Any:
                with observe(Action(0, kind, 0)):
                    return old(*args, **kwargs)

            return observed

        return make

    targets = {"forward_step": FORWARD, "backward_step": FULL}
    done = [
        replace(f"megatron.core.pipeline_parallel.schedules:{name}", around(kind)) for name, kind in targets.items()
    ]
    try:
        yield
    finally:
        restore_all(done)
