"""Compare our pipeline schedules with Megatron's own on one GPT, in the same processes, in alternating steps.

One whose activations move away is compared with itself, without moves.
"""

import gc
import io
import logging
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from itertools import batched, product
from operator import mul
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from megatron_cp.bench.activations import LiveActivations
from megatron_cp.bench.comparison import WrongResultError
from megatron_cp.bench.pipeline import ActionRecorder, GptSize, Line, MeasuredSchedule, OffloadPairs, Pairs
from megatron_cp.bench.processes import on_ranks
from megatron_cp.comm import Fabric, largest
from megatron_cp.errors import CannotRun, Refused
from megatron_cp.megatron.rebind import replace, restore_all
from megatron_cp.pipeline import SCHEDULES
from megatron_cp.pipeline.action import FORWARD, FULL, Action
from megatron_cp.pipeline.build import build
from megatron_cp.pipeline.execute import Observe
from megatron_cp.pipeline.offload import Offload, most_kept
from megatron_cp.pipeline.schedule import Schedule
from megatron_cp.pipeline.slices import model_lengths

if TYPE_CHECKING:
    from megatron_cp.megatron.bench.model import ModelChunks
    from megatron_cp.megatron.bench.overhead import Overhead
    from megatron_cp.megatron.run import Settings

ROUNDING = 1e-5
"""Largest difference of gradients that are summed in parts, over the largest gradient."""
LOSS_ROUNDING = 1e-6
"""Largest difference of losses that are summed in parts, over the loss."""

BASELINES = {False: "Megatron's 1F1B", True: "Megatron's interleaved"}
WITHOUT = "without moves"


Key = tuple[int, int, str]


class ScheduleGroup(NamedTuple):
    """Schedules of ours to compare with v chunks, at these numbers of microbatches.

    slices:  of each sequence, of one schedule; None for a model whose attention takes none
    offload: most chunks that a rank keeps, of one schedule; None for a comparison with Megatron's own
    """

    v: int
    names: tuple[str, ...]
    micros: tuple[int, ...]
    slices: int | None = None
    offload: int | None = None

    @property
    def baseline(self) -> str:
        """Name of what the schedules are compared with."""
        return BASELINES[self.v > 1] if self.offload is None else WITHOUT

    def schedules(self, ranks: int) -> Iterator[Schedule]:
        """Yield the table of each schedule and number of microbatches; raises ValueError where there is none."""
        moves = None if self.offload is None else Offload(self.offload)
        for name, m in product(self.names, self.micros):
            schedule = build(name, ranks, m, self.v, slices=self.slices or 1, moves=moves)
            if moves and schedule.to is None:
                raise Refused(
                    f"{name} at p = {ranks}, m = {m} keeps at most {max(most_kept(schedule))} chunks on a rank by "
                    f"itself, and a limit of {self.offload} moves nothing; take a lower one, or another schedule"
                )
            yield schedule

    def settings(self, name: str, size: GptSize) -> "Settings":
        """Return the settings of a run of one schedule; raises ValueError where a slice would be empty."""
        from megatron_cp.megatron.flags.pipeline import PipelineFlags
        from megatron_cp.megatron.run import Settings

        limit = None if self.offload is None else str(self.offload)
        flags = PipelineFlags(schedule=name, slices=self.slices, offload=limit)
        return Settings(pipeline=flags, slice_lengths=self.lengths(name, size))

    def lengths(self, name: str, size: GptSize) -> tuple[int, ...]:
        """Return the tokens of each slice, cut by cost; () for whole sequences."""
        if self.slices is None or self.slices == 1:
            return ()
        # of a layer: four h x h matrices of attention, and two h x 4h
        parameters, width = 12 * size.hidden**2, size.hidden
        return tuple(model_lengths(self.slices, size.seq, 2, parameters, width, SCHEDULES.get(name).split))


class RankSteps(NamedTuple):
    """One rank's steps of one schedule at one number of microbatches, and its activations after each action.

    moved: bytes that left in a step
    """

    lines: list[Line]
    live: list[tuple[Action, int]]
    moved: int = 0


def bench(model: GptSize, groups: Sequence[ScheduleGroup], rounds: int, repeat: int = 1) -> list[Pairs | OffloadPairs]:
    """Measure on processes of this machine, pinned to cores on a CPU: `rounds` pairs of `repeat` steps each.

    Raises ValueError for what a schedule cannot do, and RuntimeError when losses or gradients differ from those of
    Megatron's own schedule.
    """
    for group in groups:
        deque(group.schedules(model.ranks), maxlen=0)
        for name in group.names:
            group.lengths(name, model)
    if 0 < torch.cuda.device_count() < model.ranks:
        raise CannotRun(
            f"{model.ranks} ranks need a GPU each, this machine has {torch.cuda.device_count()}; hide them "
            "with CUDA_VISIBLE_DEVICES= to use the CPU's cores"
        )
    return list(pairs(groups, on_ranks(model.ranks, _compare, model, list(groups), rounds * repeat), repeat))


def pairs(
    groups: Sequence[ScheduleGroup], taken: Sequence[Mapping[Key, RankSteps]], repeat: int = 1
) -> Iterator[Pairs | OffloadPairs]:
    """Yield what all ranks measured, schedule by schedule; raises RuntimeError where nothing moved."""

    def steps(*key: Any) -> list[list[Line]]:
        return list(map(list, zip(*(mine[key].lines for mine in taken), strict=True)))

    for group in groups:
        for schedule in group.schedules(len(taken)):
            v, m, name = group.v, schedule.sequences, schedule.name
            ours, theirs = steps(v, m, name), steps(v, m, group.baseline)
            if group.offload is None:
                live = [mine[v, m, name].live for mine in taken]
                yield Pairs(MeasuredSchedule(schedule, ours, live), group.baseline, theirs, repeat)
                continue
            moved = sum(mine[v, m, name].moved for mine in taken)
            if not moved:
                raise WrongResultError(f"{name} at m = {m} with a limit of {group.offload} chunks moved no byte")
            yield OffloadPairs(schedule, group.offload, ours, theirs, moved, repeat)


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
            chunks = ModelChunks(model, group.v, sliceable=group.slices is not None)
            comparison = ScheduleComparison(fabric, device, chunks, group)
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
        from megatron_cp.megatron.pipeline.schedule import Pipeline
        from megatron_cp.megatron.pipeline.split_linear import bound_queue

        self._fabric, self._device, self.chunks, self._group, self._v = fabric, device, chunks, group, group.v
        self.observe: Observe = ActionRecorder().observe
        queue = bound_queue()
        assert queue, "pipeline_of installs the hook weight-queue"
        self._queue = queue
        self._baseline = group.baseline
        settings = {name: group.settings(name, chunks.size) for name in group.names}
        ours = {name: Pipeline(name, given, lambda action: self.observe(action)) for name, given in settings.items()}
        if group.offload is None:
            baseline = schedules.get_forward_backward_func(fabric.size, group.v if group.v > 1 else None)
        else:
            (name,) = group.names
            plain = group._replace(offload=None).settings(name, chunks.size)
            baseline = Pipeline(name, plain, lambda action: self.observe(action))
        self._pipelines = ours
        self._functions: dict[str, Callable[..., Any]] = {self._baseline: baseline, **ours}
        two_pipes = {name: given for name, given in settings.items() if given.pipeline.two_copies}
        copies = TwoCopies(chunks, next(iter(two_pipes.values()))) if two_pipes else chunks
        self._copies = dict.fromkeys(two_pipes, copies)
        self.taken: dict[Key, RankSteps] = {}

    def chunks_of(self, name: str) -> "ModelChunks":
        """Return the chunks that this function trains, with a second copy where its schedule has two pipes."""
        return self._copies.get(name, self.chunks)

    def check(self, m: int) -> None:
        """Run one step of each schedule, check losses and gradients bit for bit, and record activations.

        Gradients of two copies are equal but for rounding, and so are losses and gradients of slices.
        """
        expected = self.step(self._baseline, m), self.chunks.gradients
        if self._group.offload is not None:
            self.taken[self._v, m, self._baseline] = RankSteps([], [])
            self._check_moves(m, *expected)
            return
        for name in self._functions:
            chunks = self.chunks_of(name)
            live = LiveActivations(chunks.constants)
            self.observe = live.observe
            with live.counting(self._queue):
                losses, gradients = self.step(name, m), chunks.gradients
            lengths = self._group.lengths(name, chunks.size) if name != self._baseline else ()
            equal = losses == expected[0] and torch.equal(gradients, expected[1])
            if chunks is not self.chunks or lengths:
                error = float((gradients - expected[1]).abs().max() / expected[1].abs().max())
                equal = error <= ROUNDING and _alike(of_sequences(losses, lengths), expected[0], bool(lengths))
            self._agree(name, m, equal)
            self.taken[self._v, m, name] = RankSteps([], live.after)

    def _check_moves(self, m: int, losses: list[float], gradients: Tensor) -> None:
        """Run one step with moves, and check losses and gradients bit for bit."""
        for name, function in self._pipelines.items():
            equal = self.step(name, m) == losses and torch.equal(self.chunks.gradients, gradients)
            self._agree(name, m, equal)
            self.taken[self._v, m, name] = RankSteps([], [], function.moved)

    def _agree(self, name: str, m: int, equal: bool) -> None:
        (unequal,) = largest(self._fabric, self._device, not equal)
        if unequal:
            raise WrongResultError(f"losses or gradients of {name} at m = {m} differ from {self._baseline}")

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
        with _observed(self.observe) if name in BASELINES.values() else ExitStack():
            return self.chunks_of(name).step(self._functions[name], m)


def of_sequences(losses: Sequence[float], lengths: Sequence[int]) -> list[float]:
    """Return the mean losses of whole sequences from those of their slices of these lengths; () for no slices."""
    if not lengths:
        return list(losses)
    parts = [length / sum(lengths) for length in lengths]
    return [sum(map(mul, some, parts)) for some in batched(losses, len(parts))]


def _alike(losses: Sequence[float], expected: Sequence[float], rounded: bool) -> bool:
    if not rounded:
        return losses == expected
    pairs = zip(losses, expected, strict=True)
    return all(abs(loss - other) <= LOSS_ROUNDING * abs(other) for loss, other in pairs)


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
