"""Placement `fastermoe`: shadows of the busiest experts on every rank (FasterMoE, PPoPP 2022, section 4.1).

A shadow's rows do not travel: each rank computes its own. The busiest expert of the busiest rank gets one, and so on;
of all these numbers of shadows the fastest is taken. With one expert on a rank that is the paper's order by rows.
"""

from megatron_cp.experts.slots import Counts, SlotCosts, SlotPlan, load_of


def propose(plan: SlotPlan, counts: Counts, costs: SlotCosts) -> SlotPlan:
    """Return the shadows for these counts, whatever the plan was."""
    found = SlotPlan.empty(plan.slots)
    load = load_of(found, counts)
    best, fastest = found, load.seconds(costs)
    rows = [sum(column) for column in zip(*counts, strict=True)]
    while True:
        able = [expert for expert in range(plan.slots.experts) if _fits(found, expert)]
        if not able:
            return best
        # among equals the lowest number
        chosen = max(able, key=lambda expert: (load.rows[plan.slots.home(expert)], rows[expert], -expert))
        for rank in _others(found, chosen):
            found = found.with_copy(chosen, rank)
        load = load_of(found, counts)
        if (seconds := load.seconds(costs)) < fastest:
            best, fastest = found, seconds


def _others(plan: SlotPlan, expert: int) -> list[int]:
    return [rank for rank in range(plan.slots.ranks) if rank != plan.slots.home(expert)]


def _fits(plan: SlotPlan, expert: int) -> bool:
    return bool(others := _others(plan, expert)) and all(plan.takes(expert, rank) for rank in others)
