"""Hold measured pipeline steps beside the simulation of their actions' median times."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import batched
from math import inf
from statistics import median
from typing import Any, NamedTuple

from megatron_cp.bench.activations import changes
from megatron_cp.bench.processes import QUIET
from megatron_cp.pipeline.action import COMPUTE, FORWARD, FULL, INPUT, MOVES, WEIGHT, Action, first_half
from megatron_cp.pipeline.costs import Costs
from megatron_cp.pipeline.passes import awaited, merge
from megatron_cp.pipeline.schedule import Schedule
from megatron_cp.pipeline.simulate import Bar, SimulatedStep, simulate
from megatron_cp.pipeline.slices import SliceShare


class GptSize(NamedTuple):
    """A GPT in float32 on the ranks of a pipeline; a microbatch is one sequence."""

    ranks: int
    layers: int
    hidden: int
    seq: int


class TimedAction(NamedTuple):
    """One action with its start and end, in milliseconds of the machine's clock, and the share of its core it got."""

    action: Action
    start: float
    end: float
    core_share: float


Line = list[TimedAction]
"""One rank's step."""
Step = Sequence[Line]


class ActionRecorder:
    """Records the times of every action that an executor runs; processes of one machine share the clock.

    settle: waits until the device has finished its queue
    """

    def __init__(self, settle: Callable[[], None] = lambda: None) -> None:
        self._settle = settle
        self.line: Line = []

    @contextmanager
    def observe(self, action: Action) -> Iterator[None]:
        """Time the action that runs inside."""
        start, core = time.perf_counter(), time.process_time()
        yield
        self._settle()
        end, core = time.perf_counter(), time.process_time() - core
        self.line.append(TimedAction(action, start * 1e3, end * 1e3, core / (end - start)))

    def take(self) -> Line:
        """Return the actions since the last call, which make one step."""
        line, self.line = self.line, []
        return line


def computed(line: Line) -> Line:
    """Return the actions that compute, without transfers."""
    return [timed for timed in line if timed.action.kind in COMPUTE]


def step_time(step: Step) -> float:
    """Return the milliseconds from the first start to the last end over all ranks."""
    return max(computed(line)[-1].end for line in step) - min(computed(line)[0].start for line in step)


def copy_time(step: Step) -> float:
    """Return the milliseconds that moves of activations took on the rank where they took longest."""
    return max(sum(timed.end - timed.start for timed in line if timed.action.kind in MOVES) for line in step)


def core_share(steps: Iterable[Step]) -> float:
    """Return the smallest over ranks of the median share of a core that a rank got while it computed."""
    shares: dict[int, list[float]] = defaultdict(list)
    for step in steps:
        for rank, line in enumerate(step):
            shares[rank] += [timed.core_share for timed in computed(line)]
    return min(map(median, shares.values()))


@dataclass(frozen=True, kw_only=True)
class SliceCosts(Costs):
    """Costs of slices that differ from stage to stage: the time of each stage's actions of each slice."""

    of_slices: Mapping[tuple[int, str, int], float]

    def time(self, action: Action) -> float:
        """Return the time of a compute action."""
        return self.of_slices[action.stage, action.kind, (action.micro or 0) % len(self.slices)]


@dataclass(frozen=True)
class MeasuredSchedule:
    """Measured steps of one schedule, and the bytes of activations alive after each action.

    steps: one per round
    live:  per rank, in one more step
    """

    schedule: Schedule
    steps: Sequence[Step]
    live: Sequence[Sequence[tuple[Action, int]]]

    @cached_property
    def of_slices(self) -> dict[tuple[int, str, int], float]:
        """Median milliseconds of each stage's F, B, I and W of each slice; of whole sequences as one slice."""
        found: dict[tuple[int, str, int], list[float]] = defaultdict(list)
        for timed in (timed for step in self.steps for line in step for timed in computed(line)):
            stage, kind, micro = timed.action
            found[stage, kind, (micro or 0) % self.schedule.slices].append(timed.end - timed.start)
        return {key: median(values) for key, values in found.items()}

    @cached_property
    def times(self) -> dict[tuple[int, str], float]:
        """Median milliseconds of each stage's F, B, I and W of a microbatch, all its slices together."""
        found: dict[tuple[int, str], float] = defaultdict(float)
        for (stage, kind, _), took in self.of_slices.items():
            found[stage, kind] += took
        return dict(found)

    @cached_property
    def run(self) -> SimulatedStep:
        """Simulation of the merged table, as it was executed, with the median times."""
        return simulate(merge(self.schedule), self.costs)

    @cached_property
    def costs(self) -> Costs:
        """Median times in milliseconds, memory in bytes."""
        placement = self.schedule.placement
        stages = range(len(placement.rank_of))
        halves = [_halves(self.times, stage) for stage in stages]
        slices = self.schedule.slices
        memory = [_memory(self.live[placement.rank_of[stage]], stage, slices) for stage in stages]
        kept, held = zip(*((sum(of_slices), waits) for of_slices, waits in memory), strict=True)
        whole = Costs(
            forward=tuple(self.times[stage, FORWARD] for stage in stages),
            input=tuple(half for half, _ in halves),
            weight=tuple(half for _, half in halves),
            comm=hop_time(self.schedule, self.steps),
            kept=kept,
            held=held,
            unit=1.0,
        )
        if slices == 1:
            return whole
        parts = [sum(of_slice) / sum(kept) for of_slice in zip(*(of_slices for of_slices, _ in memory), strict=True)]
        shares = tuple(SliceShare(*(1 / slices,) * 3, part) for part in parts)
        return SliceCosts(**vars(replace(whole, slices=shares)), of_slices=self.of_slices)

    @property
    def peak(self) -> list[int]:
        """Largest bytes alive after an action, per rank."""
        return [max(size for _, size in after) for after in self.live]


def _halves(times: Mapping[tuple[int, str], float], stage: int) -> tuple[float, float]:
    """Return T_I and T_W; for a stage without a split backward, half of B each, since only their sum counts."""
    if (stage, INPUT) in times:
        return times[stage, INPUT], times[stage, WEIGHT]
    return times[stage, FULL] / 2, times[stage, FULL] / 2


def _memory(after: Iterable[tuple[Action, int]], stage: int, slices: int) -> tuple[list[int], int]:
    """Return M_B of each slice and M_W of a stage: the bytes that F adds, and those that W's of all slices free."""
    found: dict[tuple[str, int], list[int]] = defaultdict(list)
    for action, change in changes(after):
        if action.stage == stage:
            found[action.kind, (action.micro or 0) % slices].append(abs(change))
    kept = [round(median(found[FORWARD, number])) for number in range(slices)]
    waits = [median(values) for (kind, _), values in found.items() if kind == WEIGHT]
    # gradients wait for W too, for a short sequence more than the input gradient freed, which Costs cannot express
    return kept, min(sum(kept), round(sum(waits))) if waits else sum(kept)


def hop_time(schedule: Schedule, steps: Iterable[Step]) -> float:
    """Return T_comm: median time from the end of an action to the start of the one that waits for it on another rank.

    It is 0 when no action ever waited, because then no hop delays anything.
    """
    gaps = [gap for step in steps for gap in _gaps(schedule, step)]
    return median(gaps) if gaps else 0.0


def _gaps(schedule: Schedule, step: Step) -> Iterator[float]:
    made = {first_half(timed.action): (rank, timed.end) for rank, line in enumerate(step) for timed in computed(line)}
    for rank, line in enumerate(step):
        free = -inf
        for timed in computed(line):
            needs = awaited(schedule, timed.action)
            if needs is not None and timed.action.kind != WEIGHT:
                maker, end = made[needs]
                if maker != rank and free < end:
                    yield max(0.0, timed.start - end)
            free = timed.end


@dataclass(frozen=True, kw_only=True)
class ScheduleResult:
    """Figures of one schedule at one number of microbatches; times in milliseconds.

    step:       first start to last end over ranks, median over steps
    simulated:  makespan of the actions' median `times` per microbatch and stage, with T_comm for a hop
    baseline:   Megatron's own schedule with the same v; `baseline_step` is the median of its steps
    speedups:   the baseline's time over ours, of each pair
    peak:       most activations alive after an action, per rank and in M_B of that rank
    simulated_peak: the same by the simulator, with the run's own M_B and M_W
    core_share: smallest share of its core that a rank got while it computed, in our steps and the baseline's
    slices:     of each sequence
    """

    schedule: str
    v: int
    micros: int
    step: float
    simulated: float
    baseline: str
    baseline_step: float
    speedups: list[float]
    peak: list[float]
    simulated_peak: list[float]
    times: dict[str, float]
    T_comm: float
    core_share: float

    slices: int = 1

    @property
    def ratio(self) -> float:
        """MeasuredSchedule step over simulated makespan."""
        return self.step / self.simulated

    @property
    def wins(self) -> int:
        """Pairs in which our step was faster."""
        return sum(speedup > 1 for speedup in self.speedups)

    @property
    def quiet(self) -> bool:
        """True if background load was low enough to trust the result."""
        return self.core_share >= QUIET

    def as_json(self) -> dict[str, Any]:
        """Return the figures; `ratio` and `speedups` are null where the machine was busy."""
        verdict = {"ratio": self.ratio if self.quiet else None, "speedups": self.speedups if self.quiet else None}
        return asdict(self) | verdict


class Pairs(NamedTuple):
    """Steps of one schedule and of Megatron's own, measured in turns; `repeat` of each make a pair."""

    ours: MeasuredSchedule
    baseline: str
    baseline_steps: Sequence[Step]
    repeat: int

    def row(self) -> ScheduleResult:
        """Return the figures of the pairs."""
        measured, run = self.ours, self.ours.run
        schedule, costs = measured.schedule, measured.costs
        pipes = schedule.placement.pipes
        own = [sum(costs.kept[stage] for stage in mine) / pipes for mine in schedule.placement.of_rank]
        ours, theirs = (_times(steps, self.repeat) for steps in (measured.steps, self.baseline_steps))
        return ScheduleResult(
            schedule=schedule.name,
            v=schedule.placement.chunks,
            micros=schedule.sequences,
            slices=schedule.slices,
            step=median(map(step_time, measured.steps)),
            simulated=run.makespan,
            baseline=self.baseline,
            baseline_step=median(map(step_time, self.baseline_steps)),
            speedups=[their / our for their, our in zip(theirs, ours, strict=True)],
            peak=[size / unit for size, unit in zip(measured.peak, own, strict=True)],
            simulated_peak=[size / unit for size, unit in zip(run.peak, own, strict=True)],
            times={f"{stage}{kind}": time for (stage, kind), time in sorted(measured.times.items())},
            T_comm=costs.comm,
            core_share=core_share([*measured.steps, *self.baseline_steps]),
        )


def _times(steps: Sequence[Step], repeat: int) -> list[float]:
    return [median(some) for some in batched(map(step_time, steps), repeat)]


@dataclass(frozen=True, kw_only=True)
class OffloadResult:
    """Figures of one schedule whose activations move away; times in milliseconds.

    limit:      chunks that a rank keeps
    moved:      bytes that leave in a step, over all ranks
    step:       first start to last end over ranks, median over steps
    baseline_step: the same without moves
    copies:     time of a step's moves on the rank where they take longest, median over steps
    ratios:     the step over that without moves, of each pair
    core_share: smallest share of its core that a rank got while it computed, in steps with and without moves
    """

    schedule: str
    v: int
    micros: int
    limit: int
    moved: int
    step: float
    baseline_step: float
    copies: float
    ratios: list[float]
    core_share: float

    @property
    def ratio(self) -> float:
        """Step over that without moves, median over pairs."""
        return median(self.ratios)

    @property
    def beyond(self) -> float:
        """Time of a step beyond that without moves and the copies, as a part of the former."""
        return (self.step - self.baseline_step - self.copies) / self.baseline_step

    @property
    def quiet(self) -> bool:
        """True if background load was low enough to trust the result."""
        return self.core_share >= QUIET

    def as_json(self) -> dict[str, Any]:
        """Return the figures; `ratio`, `beyond` and `ratios` are null where the machine was busy."""
        verdict = {"ratio": self.ratio, "beyond": self.beyond, "ratios": self.ratios}
        return asdict(self) | (verdict if self.quiet else dict.fromkeys(verdict))


class OffloadPairs(NamedTuple):
    """Steps of one schedule with moves and without, measured in turns; `repeat` of each make a pair.

    moved: bytes that left in a step, over all ranks
    """

    schedule: Schedule
    limit: int
    steps: Sequence[Step]
    baseline_steps: Sequence[Step]
    moved: int
    repeat: int

    def row(self) -> OffloadResult:
        """Return the figures of the pairs."""
        ours, theirs = (_times(steps, self.repeat) for steps in (self.steps, self.baseline_steps))
        return OffloadResult(
            schedule=self.schedule.name,
            v=self.schedule.placement.chunks,
            micros=self.schedule.micros,
            limit=self.limit,
            moved=self.moved,
            step=median(map(step_time, self.steps)),
            baseline_step=median(map(step_time, self.baseline_steps)),
            copies=median(map(copy_time, self.steps)),
            ratios=[our / their for our, their in zip(ours, theirs, strict=True)],
            core_share=core_share([*self.steps, *self.baseline_steps]),
        )


def middle(steps: Sequence[Step]) -> Step:
    """Return the step whose time is the median."""
    return sorted(steps, key=step_time)[len(steps) // 2]


def recorded(step: Step) -> list[list[Bar]]:
    """Return the bars of a step for every rank, with times from the step's first start."""
    lines = [computed(line) for line in step]
    first = min(line[0].start for line in lines)
    return [[Bar(timed.action, timed.start - first, timed.end - first) for timed in line] for line in lines]
