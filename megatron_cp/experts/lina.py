"""Placement `lina`: as many copies of an expert as its popularity asks for (Lina, USENIX ATC 2023, section 5).

All spare slots are given out, each to the expert whose copies have the most rows then; after that the copies are placed
where the load is least, busiest first.
"""

from megatron_cp.experts.slots import Counts, SlotCosts, SlotPlan


def propose(plan: SlotPlan, counts: Counts, costs: SlotCosts) -> SlotPlan:
    """Return the copies for these counts, whatever the plan and the costs were."""
    slots = plan.slots
    rows = [sum(column) for column in zip(*counts, strict=True)]
    numbers = [1] * slots.experts
    for _ in range(slots.ranks * slots.spare):
        able = [expert for expert in range(slots.experts) if numbers[expert] < slots.ranks and rows[expert]]
        if not able:
            break
        numbers[max(able, key=lambda expert: (rows[expert] / numbers[expert], -expert))] += 1
    load = [0.0] * slots.ranks
    for expert in range(slots.experts):
        load[slots.home(expert)] += rows[expert] / numbers[expert]
    found = SlotPlan.empty(slots)
    for expert in sorted(range(slots.experts), key=lambda expert: (-rows[expert] / numbers[expert], expert)):
        for _ in range(numbers[expert] - 1):
            able = [rank for rank in range(slots.ranks) if found.takes(expert, rank)]
            # the slots that are left may be on ranks that have it
            if not able:
                break
            rank = min(able, key=lambda rank: (load[rank], rank))
            found = found.with_copy(expert, rank)
            load[rank] += rows[expert] / numbers[expert]
    return found
