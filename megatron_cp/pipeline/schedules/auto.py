"""The project's own schedule: from measured times and memory caps, on any placement.

1. The list scheduler runs with the orders of the papers' rules and with groups of microbatches of several sizes, and
   with several depths of warm-up, delays of W and ways to fill gaps, on a step with few microbatches.
2. The last finds of this search run at full size.
3. Every fixed rule of the same placement that fits under the caps is played too, and the best table is taken.

The search counts actions, not seconds, so that every rank that runs it finds the same table.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import ceil, inf
from typing import NamedTuple

from megatron_cp.errors import Refused
from megatron_cp.pipeline import SCHEDULES, Rule
from megatron_cp.pipeline.bounds import least_memory, lower_bound
from megatron_cp.pipeline.costs import Costs
from megatron_cp.pipeline.list_schedule import EPSILON, Knobs, Order, grouped, list_schedule, orders_of
from megatron_cp.pipeline.offload import Offload, under
from megatron_cp.pipeline.passes import check
from megatron_cp.pipeline.placement import PLACEMENTS, Placement
from megatron_cp.pipeline.schedule import BadSchedule, Schedule
from megatron_cp.pipeline.simulate import OBJECTIVES, SimulatedStep, peak_memory, simulate, simulate_below

WARMUPS = (1.0, 1.25, 1.5, 1.75, 2.0)
# actions that the search may place; the shorter step it searches on has a few thousand
BUDGET = 200_000
# finds of the search that are played at full size
FINALISTS = 3


class SearchPoint(NamedTuple):
    """One point of the search.

    orders: where forwards and backwards take their orders from: a rule, or groups of so many microbatches
    slope:  forwards a rank admits beyond those it must, per rank between it and the last one; inf for as many as fit
    spare:  forwards beyond that for a rank that has nothing else to do
    lag:    input gradients that may wait for their W, per rank before it; inf for as many as fit
    share:  part of a W that must fit into a gap
    """

    orders: str | int
    slope: float = 1.0
    spare: int = 0
    lag: float = 1.0
    share: float = 1.0


SLOPES = (1.0, inf, 2.0, 1.5, 3.0, 2.5, 0.5, 0.0, 1.25, 1.75, 2.25)
LAGS = (1.0, 2.0, inf, 0.0, 0.5, 1.5, 3.0)
SHARES = (1.0, 0.5, 0.25)
SPARES = (0, 2, 6, 1000)


@dataclass(frozen=True)
class SchedulingTask:
    """The step to schedule; `caps` are per rank, in M_B."""

    placement: Placement
    micros: int
    costs: Costs
    caps: tuple[float, ...]
    objective: str

    @property
    def actions(self) -> int:
        return 3 * self.micros * len(self.placement.rank_of)


def auto(
    placement: Placement,
    m: int,
    costs: Costs,
    caps: Sequence[float] | None = None,
    objective: str = "makespan",
    moves: Offload | None = None,
) -> Schedule:
    """Return the best table found for these times and memory caps, at least as good as every rule of the placement.

    caps:      per rank, in M_B; no cap when not given
    objective: `makespan`, which a synchronous optimizer step waits for, or `span`, the longest of the ranks' own
    moves:     limit of chunks beyond which activations move away, also one that is fitted to the caps
    Raises ValueError for a cap under which no step could end, saying the least.
    """
    if objective not in OBJECTIVES:
        raise Refused(f"unknown objective {objective!r}; known: {', '.join(OBJECTIVES)}")
    task = SchedulingTask(placement, m, costs, tuple(caps or [inf] * placement.ranks), objective)
    least = least_memory(placement, costs)
    if min(task.caps) < least - EPSILON:
        raise Refused(f"a cap of {min(task.caps):g} M_B is below the minimum {least:g} M_B, one microbatch at a time")
    if moves is not None:
        return _best_moved(placement, m, costs, caps, objective, moves)
    with _no_garbage_collector():
        best = _best_searched(task)
        for schedule in _ruled(task):
            best = _better(task, schedule, best)
    assert best, "one microbatch at a time fits under every cap"
    return replace(best.schedule, name="auto")


# asked once more by what says how a table with moves was chosen
@lru_cache(4)
def unmoved(placement: Placement, m: int, costs: Costs, caps: tuple[float, ...] | None, objective: str) -> Schedule:
    """Return what `auto` finds where nothing moves."""
    return auto(placement, m, costs, caps, objective)


def _best_moved(
    placement: Placement, m: int, costs: Costs, caps: Sequence[float] | None, objective: str, moves: Offload
) -> Schedule:
    """Return the best of the rules' tables, and of those found with and without the caps, once activations move.

    Under caps each table has the largest limit that fits: a smaller one moves more, and its makespan is no shorter.
    """
    found: list[SimulatedStep] = []
    refusal: ValueError | None = None
    for candidate in _to_move(placement, m, costs, caps, objective):
        try:
            run = simulate(under(candidate(), moves, costs, caps), costs)
        except ValueError as error:
            refusal = error
            continue
        if all(peak <= cap + EPSILON for peak, cap in zip(run.peak, caps or [inf] * placement.ranks, strict=True)):
            found.append(run)
    if not found:
        raise refusal or Refused(f"no table keeps to {min(caps or [inf]):g} M_B with moves under this limit")
    best = min(found, key=lambda run: (run.objective(objective), run.moved))
    return replace(best.schedule, name="auto")


def _to_move(
    placement: Placement, m: int, costs: Costs, caps: Sequence[float] | None, objective: str
) -> Iterator[Callable[[], Schedule]]:
    yield lambda: unmoved(placement, m, costs, None, objective)
    if caps:
        yield lambda: unmoved(placement, m, costs, tuple(caps), objective)
    for schedule in _ruled(SchedulingTask(placement, m, costs, (inf,) * placement.ranks, objective)):
        yield partial(check, schedule)


@contextmanager
def _no_garbage_collector() -> Iterator[None]:
    """Pause the garbage collector: it took a quarter of the time on millions of actions that hold no cycles."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def _best_searched(task: SchedulingTask) -> SimulatedStep | None:
    """Return the best of the search's last finds, played at full size."""
    best = None
    for choice in reversed(_search(_shorter(task))[-FINALISTS:]):
        best = _better(task, _searched(task, _orders(task, choice.orders), choice, _bar(task, best)), best)
    return best


def _shorter(task: SchedulingTask) -> SchedulingTask:
    """Return the step with fewer microbatches: equal ramps and a shorter steady state."""
    p = task.placement.ranks
    return replace(task, micros=min(task.micros, max(2 * p, 24) + task.micros % p))


def _search(task: SchedulingTask) -> list[SearchPoint]:
    """Return points that each beat the ones before: for every order in turn, until no neighbour helps."""
    found: list[SearchPoint] = []
    best: SimulatedStep | None = None
    floor = lower_bound(task.placement, task.micros, task.costs, task.caps) * (1 + EPSILON)
    budget = BUDGET
    for start, orders in _starts(task).items():
        queue = [*_neighbours(SearchPoint(start))]
        tried = set[SearchPoint]()
        while queue and (budget > 0 or not best) and not _reached(best, task, floor):
            choice = queue.pop(0)
            if choice in tried:
                continue
            tried.add(choice)
            schedule = _searched(task, orders, choice, _bar(task, best))
            budget -= task.actions if schedule else task.actions // 4
            run = _better(task, schedule, best)
            if run is not best:
                best = run
                found.append(choice)
                queue += _neighbours(choice)
    return found


def _reached(best: SimulatedStep | None, task: SchedulingTask, floor: float) -> bool:
    return best is not None and task.objective == "makespan" and best.makespan <= floor


def _neighbours(here: SearchPoint) -> Iterator[SearchPoint]:
    """Yield points near `here`: warm-up and delay of W together, since one alone often does not help, then the rest."""
    yield from (here._replace(slope=slope, lag=lag) for slope in SLOPES for lag in LAGS)
    yield from (here._replace(share=share) for share in SHARES)
    yield from (here._replace(spare=spare) for spare in SPARES)


def _starts(task: SchedulingTask) -> dict[str | int, list[Order]]:
    """Return the orders of the rules, and groups of microbatches down to one, which fits under every cap."""
    p = task.placement.ranks
    sizes = sorted({min(size, task.micros) for size in (p, ceil(p / 2), ceil(p / 4), 1)}, reverse=True)
    starts: dict[str | int, list[Order]] = {}
    names: list[str | int] = [rule.name for rule in _rules(task.placement)]
    for start in [*names, *sizes]:
        orders = _orders(task, start)
        if orders not in starts.values():
            starts[start] = orders
    return starts


def _orders(task: SchedulingTask, start: str | int) -> list[Order]:
    if isinstance(start, int):
        return grouped(task.placement, task.micros, start)
    return orders_of(SCHEDULES.get(start).make(task.placement.ranks, task.micros, task.placement.chunks))


def _searched(task: SchedulingTask, orders: Sequence[Order], choice: SearchPoint, bar: float) -> Schedule | None:
    last = task.placement.ranks - 1
    knobs = Knobs(
        limit=[order.needed + _times(choice.slope, last - rank) for rank, order in enumerate(orders)],
        spare=choice.spare,
        lag=[_times(choice.lag, rank) for rank in range(last + 1)],
        share=choice.share,
    )
    table = list_schedule(task.placement, task.costs, task.caps, orders, knobs, bar)
    return Schedule("auto", task.placement, task.micros, table) if table else None


def _times(per_rank: float, ranks: int) -> float:
    """Return the product in whole numbers; no bound per rank means no bound on any rank."""
    return inf if per_rank == inf else int(per_rank * ranks)


def _rules(placement: Placement) -> list[Rule]:
    """Return the fixed rules of this placement and number of chunks, none that only differ in moves or weights."""
    return [
        rule
        for rule in SCHEDULES
        if rule.table
        and not rule.lends
        and not rule.delay
        and not rule.two_copies
        and PLACEMENTS[rule.placement](placement.ranks, rule.chunks or placement.chunks) == placement
    ]


def _ruled(task: SchedulingTask) -> Iterator[Schedule]:
    """Yield the tables of the fixed rules, at every warm-up multiplier where one has it."""
    for rule in _rules(task.placement):
        for warmup in WARMUPS if rule.takes_warmup else (None,):
            table = rule.make(task.placement.ranks, task.micros, task.placement.chunks, warmup)
            yield Schedule(rule.name, task.placement, task.micros, table)


def _bar(task: SchedulingTask, best: SimulatedStep | None) -> float:
    """Return the makespan at which to stop a play; a search for the shortest span has none."""
    return best.makespan * (1 + EPSILON) if best and task.objective == "makespan" else inf


def _better(task: SchedulingTask, schedule: Schedule | None, best: SimulatedStep | None) -> SimulatedStep | None:
    """Return `best`, or the played `schedule` if it is valid, fits under the caps and does better."""
    if schedule is None or any(
        peak_memory(actions, task.costs) > cap + EPSILON for actions, cap in zip(schedule.table, task.caps, strict=True)
    ):
        return best
    try:
        run = simulate_below(schedule, task.costs, _bar(task, best))
    except BadSchedule:
        return best
    if run and (best is None or run.objective(task.objective) < best.objective(task.objective)):
        return run
    return best
