"""Play a compute table against times and memory: makespan, bubble, spans and peak memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import inf
from typing import NamedTuple

from megatron_cp.pipeline.action import (
    BACKWARD,
    EVICT,
    FORWARD,
    FULL,
    HEAD,
    INPUT,
    LOGITS,
    LOGITS_BACK,
    MOVES,
    WEIGHT,
    Action,
    Cell,
    Overlap,
    flat,
    halves,
)
from megatron_cp.pipeline.copies import added_up
from megatron_cp.pipeline.costs import Costs, MeetingTimes
from megatron_cp.pipeline.meetings import Meetings
from megatron_cp.pipeline.moves import Links, peaks_over_time
from megatron_cp.pipeline.passes import deadlock
from megatron_cp.pipeline.placement import Placement
from megatron_cp.pipeline.schedule import Schedule

OBJECTIVES = ("makespan", "span")
KEPT = frozenset({WEIGHT, *HEAD})
"""Kinds that make nothing for a neighbour."""


@dataclass(frozen=True, kw_only=True)
class SimulatedStep:
    """One played step.

    starts, ends: per rank, of each cell of the table
    peak:         per rank, the most memory alive at once, in M_B
    """

    schedule: Schedule
    costs: Costs
    starts: tuple[tuple[float, ...], ...]
    ends: tuple[tuple[float, ...], ...]
    peak: tuple[float, ...]

    @cached_property
    def makespan(self) -> float:
        """The time from the first start to the last end over all ranks, for which a synchronous optimizer waits.

        Where ranks hold several copies of the model it ends when their gradients have been added up, and where the
        first and the last stage share an embedding when theirs of it have, which takes nothing on one rank, nor where
        every rank has its rows of it.
        """
        where = self.schedule.placement
        if where.pipes > 1:
            last = added_up(self.schedule, self.costs, self.ends)
        else:
            ends = [ends[-1] for ends in self.ends]
            both = {where.rank_of[0], where.rank_of[-1]}
            apart = len(both) > 1 and not self.schedule.barriers
            last = max(*ends, max(ends[rank] for rank in both) + (self.costs.tied if apart else 0.0))
        return last - min(starts[0] for starts in self.starts)

    @cached_property
    def span(self) -> float:
        """The longest time between one rank's first start and its last end."""
        return max(ends[-1] - starts[0] for starts, ends in zip(self.starts, self.ends, strict=True))

    @cached_property
    def work(self) -> float:
        """Compute time of a whole step, averaged over ranks: m times T_F + T_I + T_W when stages are equal."""
        placement = self.schedule.placement
        saved = sum(self.costs.saved(cell) for cells in self.schedule.table for cell in cells)
        return (self.schedule.sequences * sum(self.costs.work(placement)) - saved) / placement.ranks

    @cached_property
    def moved(self) -> int:
        """Chunks whose activations move away and back."""
        return sum(action.kind == EVICT for cells in self.schedule.table for action in flat(cells))

    @property
    def bubble(self) -> float:
        """Idle share of the makespan, averaged over ranks."""
        return 1 - self.work / self.makespan

    @property
    def span_bubble(self) -> float:
        """Idle share of the longest span."""
        return 1 - self.work / self.span

    @cached_property
    def transfers(self) -> int:
        """The number of tensors that pass between different ranks."""
        rank_of = self.schedule.placement.rank_of
        hops = sum(here != there for here, there in pairwise(rank_of))
        return 2 * hops * self.schedule.micros // self.schedule.placement.pipes

    def objective(self, name: str) -> float:
        """Return the makespan, or with `span` the longest span of a rank."""
        return self.span if name == "span" else self.makespan

    def bars(self) -> list[list["Bar"]]:
        """Return the actions of each rank; those of an overlap share its time in the ratio of their own times."""
        return [
            [bar for cell in zip(cells, starts, ends, strict=True) for bar in self._bars(*cell)]
            for cells, starts, ends in zip(self.schedule.table, self.starts, self.ends, strict=True)
        ]

    def _bars(self, cell: Cell, start: float, end: float) -> list["Bar"]:
        if isinstance(cell, Action):
            return [Bar(cell, start, end)]
        forward, backward = map(self.costs.time, halves(cell))
        middle = start + (end - start) * forward / (forward + backward)
        return [Bar(cell.forward, start, middle), Bar(cell.backward, middle, end)]


def simulate(schedule: Schedule, costs: Costs) -> SimulatedStep:
    """Play the compute table of `schedule`: every rank runs its list in order, each cell as early as it can.

    Raises BadSchedule, naming every rank's waiting action, when the ranks end up waiting for each other.
    """
    assert len(costs.slices) in (0, schedule.slices), "costs are of other slices than the table"
    run = simulate_below(schedule, costs)
    assert run
    return run


def simulate_below(schedule: Schedule, costs: Costs, bar: float = inf) -> SimulatedStep | None:
    """Play like `simulate`, but stop and return None as soon as the makespan is sure to reach `bar`."""
    play = _StepSimulation(schedule, costs, bar)
    awake = list(range(len(schedule.table)))[::-1]
    while awake:
        woken = play.run(awake.pop())
        if woken is None:
            return None
        awake += woken
    places = [len(done) for done in play.ends]
    if any(place < len(actions) for place, actions in zip(places, schedule.table, strict=True)):
        raise deadlock(schedule, places)
    if schedule.to is not None:
        peak = peaks_over_time(schedule, costs, play.starts, play.ends)
    else:
        peak = _peaks_in_order(schedule, costs)
    return SimulatedStep(
        schedule=schedule,
        costs=costs,
        starts=tuple(map(tuple, play.starts)),
        ends=tuple(map(tuple, play.ends)),
        peak=peak,
    )


class _StepSimulation:
    """A step while it is played. A rank runs until it needs a tensor that is not made yet; then its maker wakes it.

    made: when the output (False) or gradient (True) that a stage makes for a microbatch reaches its user
    """

    def __init__(self, schedule: Schedule, costs: Costs, bar: float) -> None:
        ranks = len(schedule.table)
        self.table = schedule.table
        self.starts: list[list[float]] = [[] for _ in range(ranks)]
        self.ends: list[list[float]] = [[] for _ in range(ranks)]
        self._placement = schedule.placement
        self._duration, self._time = durations(costs), costs.time if costs.slices else None
        self._hop = hops(schedule.placement, costs)
        self._made: dict[tuple[int, bool, int | None], float] = {
            (stage, False, micro): 0.0
            for stage in range(len(schedule.placement.rank_of))
            for micro in schedule.begun(stage)
        }
        self._asleep: dict[tuple[int, bool, int | None], int] = {}
        # how late a rank may be, before it runs anything, for its work still to end below the bar
        self._latest = [
            bar - schedule.sequences * work + sum(map(costs.saved, cells))
            for work, cells in zip(costs.work(schedule.placement), schedule.table, strict=True)
        ]
        self._saved = costs.saved
        meeting = costs.meeting or MeetingTimes(*(costs.comm,) * 3)
        self._meetings = Meetings(schedule, meeting) if schedule.barriers else None
        self._clock = [0.0] * ranks
        self._links = [Links(schedule.to, costs) if schedule.to is not None else None for _ in range(ranks)]

    def run(self, rank: int) -> list[int] | None:
        """Run `rank` as far as it comes; return the ranks it wakes, or None when it is too late for the bar."""
        starts, ends = self.starts[rank], self.ends[rank]
        clock, latest, links = self._clock[rank], self._latest[rank], self._links[rank]
        woken = []
        for cell in self.table[rank][len(ends) :]:
            if links and isinstance(cell, Action) and cell.kind in MOVES:
                for times, time in zip((starts, ends), links.move(cell, clock), strict=True):
                    times.append(time)
                continue
            start = self._cell_start(cell, clock, rank)
            if start is None:
                break
            if links:
                start = max(start, *map(links.ready, halves(cell)))
            latest += (took := self._took(cell))
            clock = start + took
            if clock >= latest:
                return None
            starts.append(start)
            ends.append(clock)
            for action in halves(cell):
                if action.kind not in KEPT:
                    woken += self._hand_over(action, clock)
            if self._meetings:
                woken += self._meetings.ran(cell, rank, clock)
        self._clock[rank], self._latest[rank] = clock, latest
        return woken

    def _took(self, cell: Cell) -> float:
        if isinstance(cell, Action):
            return self._time(cell) if self._time else self._duration[cell.kind][cell.stage]
        return self._took(cell.forward) + self._took(cell.backward) - self._saved(cell)

    def _cell_start(self, cell: Cell, clock: float, rank: int) -> float | None:
        if self._meetings:
            clock = self._meetings.start(cell, clock, rank)
            if clock == inf:
                return None
        if isinstance(cell, Overlap):
            start = self._start(cell.forward, clock, rank)
            return None if start is None else self._start(cell.backward, start, rank)
        return clock if cell.kind in KEPT else self._start(cell, clock, rank)

    def _start(self, action: Action, clock: float, rank: int) -> float | None:
        """Return when `action` can start; None, and `rank` falls asleep, if a tensor it needs is not made yet."""
        stage, kind, micro = action
        if kind == FORWARD and self._placement.first(stage):
            return clock
        if kind == FORWARD:
            key = (stage - 1, False, micro)
        else:
            key = (stage, False, micro) if self._placement.last(stage) else (stage + 1, True, micro)
        arrival = self._made.get(key, inf)
        if arrival == inf:
            self._asleep[key] = rank
            return None
        return max(clock, arrival)

    def _hand_over(self, action: Action, clock: float) -> list[int]:
        key = (action.stage, action.kind != FORWARD, action.micro)
        self._made[key] = clock + self._hop[key[1]][action.stage]
        return [self._asleep.pop(key)] if key in self._asleep else []


def peaks(schedule: Schedule, costs: Costs) -> tuple[float, ...]:
    """Return the most memory of each rank at once, in M_B; moves keep it for as long as they take."""
    if schedule.to is not None:
        return simulate(schedule, costs).peak
    return _peaks_in_order(schedule, costs)


def _peaks_in_order(schedule: Schedule, costs: Costs) -> tuple[float, ...]:
    return tuple(
        peak_memory(actions, costs, sum(len(schedule.begun(stage)) * costs.kept[stage] for stage in stages))
        for actions, stages in zip(schedule.table, schedule.placement.of_rank, strict=True)
    )


def durations(costs: Costs) -> dict[str, tuple[float, ...]]:
    """Return the time of each compute kind on each stage."""
    whole = tuple(a + b for a, b in zip(costs.input, costs.weight, strict=True))
    return {FORWARD: costs.forward, INPUT: costs.input, WEIGHT: costs.weight, FULL: whole} | dict(
        zip((LOGITS, LOGITS_BACK), ((time,) * len(costs.forward) for time in costs.head), strict=True)
    )


def hops(placement: Placement, costs: Costs) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the delay of each stage's output to the next stage, and of its gradient to the one before."""
    rank_of = placement.rank_of
    between = [costs.comm if here != there else 0.0 for here, there in pairwise(rank_of)]
    return (*between, 0.0), (0.0, *between)


def peak_memory(cells: Sequence[Cell], costs: Costs, alive: float = 0.0) -> float:
    """Return the largest running sum over one rank's list, in M_B: F adds M_B, I frees M_B - M_W, W frees M_W, B both.

    An overlap adds what its forward keeps before it frees anything.
    `alive` is kept of forwards that ran before.
    """
    peak = alive
    for action in flat(cells):
        kept, held = costs.kept_by(action)
        if action.kind == FORWARD:
            alive += kept
            peak = max(peak, alive)
        elif action.kind in BACKWARD:
            alive -= kept - (held if action.kind == INPUT else 0.0)
        elif action.kind == WEIGHT:
            alive -= held
    return peak / costs.unit


class Bar(NamedTuple):
    """One action and when it ran, in any one unit of time; recorded ones in milliseconds."""

    action: Action
    start: float
    end: float
