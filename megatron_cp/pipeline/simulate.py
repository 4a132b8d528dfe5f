"""Play a compute table against times and memory: makespan, bubble, spans, peak memory, and what could never be beaten."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_cp.pipeline.action import BACKWARD, FORWARD, FULL, INPUT, WEIGHT, Action
from megatron_cp.pipeline.costs import Costs
from megatron_cp.pipeline.passes import deadlock
from megatron_cp.pipeline.schedule import Schedule

OBJECTIVES = ("makespan", "span")


@dataclass(frozen=True)
class Run:
    """One played step.

    starts, ends: per rank, of each action of the table
    peak:         per rank, the most memory alive at once, in M_B
    """

    schedule: Schedule
    costs: Costs
    starts: tuple[tuple[float, ...], ...]
    ends: tuple[tuple[float, ...], ...]
    peak: tuple[float, ...]

    @cached_property
    def makespan(self) -> float:
        """From the first start to the last end over all ranks: what a synchronous optimizer step waits for."""
        return max(ends[-1] for ends in self.ends) - min(starts[0] for starts in self.starts)

    @cached_property
    def span(self) -> float:
        """The longest time between one rank's first start and its last end."""
        return max(ends[-1] - starts[0] for starts, ends in zip(self.starts, self.ends, strict=True))

    @cached_property
    def work(self) -> float:
        """Compute time of a whole step, averaged over ranks: m times T_F + T_I + T_W when stages are equal."""
        ranks = self.schedule.placement.ranks
        total = sum(self.costs.work(self.schedule.placement, rank) for rank in range(ranks))
        return self.schedule.micros * (total / ranks)

    @property
    def bubble(self) -> float:
        return 1 - self.work / self.makespan

    @property
    def span_bubble(self) -> float:
        return 1 - self.work / self.span

    @cached_property
    def transfers(self) -> int:
        """Tensors that pass between different ranks."""
        rank_of = self.schedule.placement.rank_of
        hops = sum(here != there for here, there in zip(rank_of, rank_of[1:], strict=False))
        return 2 * hops * self.schedule.micros

    def objective(self, name: str) -> float:
        """`makespan` or `span`."""
        return {"makespan": self.makespan, "span": self.span}[name]


def simulate(schedule: Schedule, costs: Costs) -> Run:
    """Play the compute table of `schedule`: every rank runs its list in order, each action as early as it can.

    Raises BadSchedule, naming every rank's waiting action, when the ranks end up waiting for each other.
    """
    starts, ends = _play(schedule, costs)
    peak = tuple(peak_memory(actions, costs) for actions in schedule.table)
    return Run(schedule, costs, tuple(map(tuple, starts)), tuple(map(tuple, ends)), peak)


def _play(schedule: Schedule, costs: Costs) -> tuple[list[list[float]], list[list[float]]]:
    """Start and end of every action. A rank runs until it meets a tensor nobody made yet, then its maker wakes it."""
    table = schedule.table
    arrivals: dict[tuple[int, bool, int | None], float] = {}
    sleepers: dict[tuple[int, bool, int | None], int] = {}
    starts: list[list[float]] = [[] for _ in table]
    ends: list[list[float]] = [[] for _ in table]
    duration = _durations(costs)
    gain = _hops(schedule, costs)
    last = len(schedule.placement.rank_of) - 1
    awake = list(range(len(table)))[::-1]
    while awake:
        rank = awake.pop()
        clock = ends[rank][-1] if ends[rank] else 0.0
        for action in table[rank][len(ends[rank]) :]:
            stage, kind, micro = action
            start = clock
            if kind != WEIGHT:
                # the key of what it waits for: who made it, whether it is a gradient, which microbatch
                back = kind != FORWARD and stage < last
                key = (stage + 1 if back else stage - (kind == FORWARD), back, micro)
                if key[0] >= 0:
                    arrival = arrivals.get(key)
                    if arrival is None:
                        sleepers[key] = rank
                        break
                    start = max(clock, arrival)
            clock = start + duration[kind][stage]
            starts[rank].append(start)
            ends[rank].append(clock)
            if kind != WEIGHT:
                made = (stage, kind != FORWARD, micro)
                arrivals[made] = clock + gain[made[1]][stage]
                if made in sleepers:
                    awake.append(sleepers.pop(made))
    if any(len(done) < len(actions) for done, actions in zip(ends, table, strict=True)):
        raise deadlock(schedule, [len(done) for done in ends])
    return starts, ends


def _durations(costs: Costs) -> dict[str, tuple[float, ...]]:
    return {
        FORWARD: costs.forward,
        INPUT: costs.input,
        WEIGHT: costs.weight,
        FULL: tuple(a + b for a, b in zip(costs.input, costs.weight, strict=True)),
    }


def _hops(schedule: Schedule, costs: Costs) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Delay of what a stage sends: its output to the next stage, its gradient to the one before."""
    rank_of = schedule.placement.rank_of
    between = [costs.comm if here != there else 0.0 for here, there in zip(rank_of, rank_of[1:], strict=False)]
    return (*between, 0.0), (0.0, *between)


def peak_memory(actions: Sequence[Action], costs: Costs) -> float:
    """The largest running sum over one rank's list, in M_B: F adds M_B, I frees M_B - M_W, W frees M_W, B frees M_B."""
    alive = peak = 0.0
    for stage, kind, _ in actions:
        if kind == FORWARD:
            alive += costs.kept[stage]
            peak = max(peak, alive)
        elif kind in BACKWARD:
            alive -= costs.kept[stage] - (costs.held[stage] if kind == INPUT else 0.0)
        elif kind == WEIGHT:
            alive -= costs.held[stage]
    return peak / costs.unit
