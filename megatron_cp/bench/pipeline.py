"""What was measured of a pipeline's steps, beside what the simulator makes of the same actions' medians."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import batched
from math import inf
from statistics import median
from typing import Any, NamedTuple

from megatron_cp.bench.activations import changes
from megatron_cp.bench.processes import QUIET
from megatron_cp.pipeline.action import COMPUTE, FORWARD, FULL, INPUT, WEIGHT, Action, first_half
from megatron_cp.pipeline.costs import Costs
from megatron_cp.pipeline.passes import awaited, merge
from megatron_cp.pipeline.schedule import Schedule
from megatron_cp.pipeline.simulate import Bar, Run, simulate


class GptSize(NamedTuple):
    """A GPT in float32 on the ranks of a pipeline; a microbatch is one sequence."""

    ranks: int
    layers: int
    hidden: int
    seq: int


class TimedAction(NamedTuple):
    """One action, when it ran, in milliseconds of the machine's clock, and the share of its core that it got."""

    action: Action
    start: float
    end: float
    core_share: float


Line = list[TimedAction]
"""One rank's step."""
Step = Sequence[Line]


class ActionRecorder:
    """What an executor puts around every action, to note when it ran; processes of one machine share the clock.

    settle: waits until the device has done what it was given
    """

    def __init__(self, settle: Callable[[], None] = lambda: None) -> None:
        self._settle = settle
        self.line: Line = []

    @contextmanager
    def observe(self, action: Action) -> Iterator[None]:
        start, core = time.perf_counter(), time.process_time()
        yield
        self._settle()
        end, core = time.perf_counter(), time.process_time() - core
        self.line.append(TimedAction(action, start * 1e3, end * 1e3, core / (end - start)))

    def take(self) -> Line:
        """The step so far; the next one begins."""
        line, self.line = self.line, []
        return line


def computed(line: Line) -> Line:
    return [timed for timed in line if timed.action.kind in COMPUTE]


def step_time(step: Step) -> float:
    """From the first start to the last end over all ranks."""
    return max(computed(line)[-1].end for line in step) - min(computed(line)[0].start for line in step)


def core_share(steps: Iterable[Step]) -> float:
    """Of the rank with the smallest median share of its core while it computed."""
    shares: dict[int, list[float]] = defaultdict(list)
    for step in steps:
        for rank, line in enumerate(step):
            shares[rank] += [timed.core_share for timed in computed(line)]
    return min(map(median, shares.values()))


@dataclass(frozen=True)
class MeasuredSchedule:
    """Steps of one schedule, per round, and the bytes of activations alive after each action of one more, per rank."""

    schedule: Schedule
    steps: Sequence[Step]
    live: Sequence[Sequence[tuple[Action, int]]]

    @cached_property
    def times(self) -> dict[tuple[int, str], float]:
        """Median of each stage's F, B, I and W."""
        found: dict[tuple[int, str], list[float]] = defaultdict(list)
        for timed in (timed for step in self.steps for line in step for timed in computed(line)):
            found[timed.action.stage, timed.action.kind].append(timed.end - timed.start)
        return {key: median(values) for key, values in found.items()}

    @cached_property
    def run(self) -> Run:
        """The merged table, as it was executed, played with the medians."""
        return simulate(merge(self.schedule), self.costs)

    @cached_property
    def costs(self) -> Costs:
        """Times in milliseconds, memory in bytes."""
        placement = self.schedule.placement
        stages = range(len(placement.rank_of))
        halves = [_halves(self.times, stage) for stage in stages]
        kept, held = zip(*(_memory(self.live[placement.rank_of[stage]], stage) for stage in stages), strict=True)
        return Costs(
            tuple(self.times[stage, FORWARD] for stage in stages),
            tuple(half for half, _ in halves),
            tuple(half for _, half in halves),
            hop_time(self.schedule, self.steps),
            kept,
            held,
            1.0,
        )

    @property
    def peak(self) -> list[int]:
        """Per rank the most bytes alive after an action."""
        return [max(size for _, size in after) for after in self.live]


def _halves(times: Mapping[tuple[int, str], float], stage: int) -> tuple[float, float]:
    """T_I and T_W; where no backward of the stage is split, how it would be divides B in any way."""
    if (stage, INPUT) in times:
        return times[stage, INPUT], times[stage, WEIGHT]
    return times[stage, FULL] / 2, times[stage, FULL] / 2


def _memory(after: Iterable[tuple[Action, int]], stage: int) -> tuple[int, int]:
    """M_B and M_W of a stage: what F adds, and what W frees."""
    found: dict[str, list[int]] = defaultdict(list)
    for action, change in changes(after):
        if action.stage == stage:
            found[action.kind].append(abs(change))
    kept = round(median(found[FORWARD]))
    # gradients wait for W too: of a short sequence more than an input gradient freed, which Costs do not know
    return kept, min(kept, round(median(found[WEIGHT]))) if found[WEIGHT] else kept


def hop_time(schedule: Schedule, steps: Iterable[Step]) -> float:
    """T_comm: median time from the end of an action to the start of the one that waits for it on another rank.

    0 where nobody ever waited: then no hop delays anything.
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
    """One schedule at one number of microbatches; times in milliseconds, per microbatch and stage medians.

    step:       first start to last end over ranks, median
    simulated:  makespan of the same actions' medians, which are `times`; T_comm is a hop's
    baseline:      Megatron's own schedule with the same v, and `baseline_step` its step
    speedups:   of each pair the baseline's time over ours
    peak:       per rank, in M_B of that rank, most activations alive after an action; simulated from the run's own M_B
                and M_W beside it
    core_share: of its core, the least that a rank got while it computed, in ours and the baseline's steps
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

    @property
    def ratio(self) -> float:
        """MeasuredSchedule step over simulated makespan."""
        return self.step / self.simulated

    @property
    def wins(self) -> int:
        return sum(speedup > 1 for speedup in self.speedups)

    @property
    def quiet(self) -> bool:
        """Whether the machine was ours enough for a verdict."""
        return self.core_share >= QUIET

    def as_json(self) -> dict[str, Any]:
        """Without a verdict `ratio` and `speedups` are null."""
        verdict = {"ratio": self.ratio if self.quiet else None, "speedups": self.speedups if self.quiet else None}
        return asdict(self) | verdict


class Pairs(NamedTuple):
    """Steps of ours and of Megatron's own schedule in turns; `repeat` of each make a pair."""

    ours: MeasuredSchedule
    baseline: str
    baseline_steps: Sequence[Step]
    repeat: int

    def row(self) -> ScheduleResult:
        measured, run = self.ours, self.ours.run
        schedule, costs = measured.schedule, measured.costs
        own = [sum(costs.kept[stage] for stage in mine) for mine in schedule.placement.of_rank]
        ours, theirs = self._times(measured.steps), self._times(self.baseline_steps)
        return ScheduleResult(
            schedule=schedule.name,
            v=schedule.placement.chunks,
            micros=schedule.micros,
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

    def _times(self, steps: Sequence[Step]) -> list[float]:
        return [median(some) for some in batched(map(step_time, steps), self.repeat)]


def middle(steps: Sequence[Step]) -> Step:
    """The step whose time is the median."""
    return sorted(steps, key=step_time)[len(steps) // 2]


def recorded(step: Step) -> list[list[Bar]]:
    """The bars of a step, from its first start on."""
    lines = [computed(line) for line in step]
    first = min(line[0].start for line in lines)
    return [[Bar(timed.action, timed.start - first, timed.end - first) for timed in line] for line in lines]
