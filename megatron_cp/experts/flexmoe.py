"""Placement `flexmoe`: copies that follow the load step by step (FlexMoE, arXiv:2304.03946).

While the load is uneven the plan in force is changed by the move that saves most: expand gives an expert of the busiest
rank one more copy, in a free slot or in the place of another copy; shrink takes a copy away; migrate moves one.
"""

from collections.abc import Iterator
from typing import NamedTuple

from megatron_cp.experts.slots import Counts, SlotCosts, SlotLoad, SlotPlan, expert_load, load_of

EVEN = 1.05
"""Rows of the busiest rank over the mean, up to which the plan is left as it is."""

PATIENCE = 1000
"""Changes that are looked at without a faster plan before the way ends."""


class SlotChange(NamedTuple):
    """A copy that comes, where an expert is named, and one that goes."""

    comes: tuple[int, int] | None
    goes: tuple[int, int] | None


def propose(plan: SlotPlan, counts: Counts, costs: SlotCosts) -> SlotPlan:
    """Return the fastest plan on the way of best moves from the plan in force; itself where the load is even.

    The way goes on through plans that are slower, for a while (PATIENCE), and comes to none twice.
    """
    load, seen, without = load_of(plan, counts), {plan}, 0
    best, lowest = plan, _key(load, costs)
    if load.uneven <= EVEN:
        return plan
    while without < PATIENCE:
        ways = ((change, _applied(plan, change)) for change in _changes(plan, load))
        moves = [
            (_key(changed, costs), number, after, changed)
            for number, (change, after) in enumerate(ways)
            if after not in seen and (changed := _loaded(plan, after, load, counts, change))
        ]
        if not moves:
            break
        key, _, plan, load = min(moves, key=lambda move: move[:2])
        seen.add(plan)
        without += len(moves)
        if key < lowest:
            best, lowest, without = plan, key, 0
    return best


def _key(load: SlotLoad, costs: SlotCosts) -> tuple[float, float]:
    """Return what a move has to lower; where two ranks are the busiest, the one of them that it helps counts too."""
    # sums and differences of fractions are equal but for rounding
    return float(f"{load.seconds(costs):.9g}"), float(f"{sum(rows * rows for rows in load.rows):.9g}")


def _changes(plan: SlotPlan, load: SlotLoad) -> Iterator[SlotChange]:
    ranks = range(plan.slots.ranks)
    copies = [(other, rank) for rank in ranks for other in plan.hosted[rank]]
    for copy in copies:
        yield SlotChange(None, copy)
    for expert in _concerned(plan, load):
        for rank in ranks:
            if plan.takes(expert, rank):
                yield SlotChange((expert, rank), None)
            for other, where in copies:
                freed = where == rank and expert not in plan.hosted[rank] and plan.slots.home(expert) != rank
                moved = other == expert and plan.takes(expert, rank)
                if freed or moved:
                    yield SlotChange((expert, rank), (other, where))


def _concerned(plan: SlotPlan, load: SlotLoad) -> list[int]:
    """Return the experts of the rank that computes most and of the one that most rows come to."""
    busiest, drawing = (column.index(max(column)) for column in (load.rows, load.arriving))
    return [expert for expert in range(plan.slots.experts) if {busiest, drawing} & {*plan.hosts(expert)}]


def _applied(plan: SlotPlan, change: SlotChange) -> SlotPlan:
    if change.goes:
        plan = plan.without_copy(*change.goes)
    return plan.with_copy(*change.comes) if change.comes else plan


def _loaded(plan: SlotPlan, after: SlotPlan, load: SlotLoad, counts: Counts, change: SlotChange) -> SlotLoad:
    """Return the load after a change, of whose experts alone it is computed."""
    for expert in sorted({copy[0] for copy in change if copy}):
        load = load.plus(expert_load(counts, expert, plan.hosts(expert)), -1)
        load = load.plus(expert_load(counts, expert, after.hosts(expert)))
    return load
