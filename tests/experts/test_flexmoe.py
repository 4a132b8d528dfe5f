"""Plans of `flexmoe` are those of a search that weighs one change after the other."""

import itertools

import pytest

from megatron_cp.experts import flexmoe
from megatron_cp.experts.flexmoe import EVEN, PATIENCE
from megatron_cp.experts.slots import SlotCosts, SlotPlan, Slots, load_of
from tests.experts.test_slots import COSTS, drawn, name_of


def changes(plan, load):
    """Each change as the plan after it, in the order that decides among equals."""
    copies = [(other, rank) for rank, hosted in enumerate(plan.hosted) for other in hosted]
    for copy in copies:
        yield plan.without_copy(*copy)
    busiest, drawing = (column.index(max(column)) for column in (load.rows, load.arriving))
    experts = [expert for expert in range(plan.slots.experts) if {busiest, drawing} & {*plan.hosts(expert)}]
    for expert, rank in itertools.product(experts, range(plan.slots.ranks)):
        if plan.takes(expert, rank):
            yield plan.with_copy(expert, rank)
        for other, where in copies:
            freed = where == rank and rank not in plan.hosts(expert)
            if freed or (other == expert and plan.takes(expert, rank)):
                yield plan.without_copy(other, where).with_copy(expert, rank)


def one_by_one(plan, counts, costs):
    def key(plan):
        load = load_of(plan, counts)
        return float(f"{load.seconds(costs):.9g}"), float(f"{sum(rows**2 for rows in load.rows):.9g}")

    if load_of(plan, counts).uneven <= EVEN:
        return plan
    best, seen, without = plan, {plan}, 0
    while without < PATIENCE:
        new = [after for after in changes(plan, load_of(plan, counts)) if after not in seen]
        if not new:
            break
        plan = min(new, key=key)
        seen.add(plan)
        without += len(new)
        if key(plan) < key(best):
            best, without = plan, 0
    return best


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("slots", [Slots(4, 2, 1), Slots(6, 3, 1), Slots(8, 4, 2)], ids=name_of)
def test_plans_are_those_of_a_search_one_by_one(slots, costs):
    plan = SlotPlan.empty(slots)
    # plans follow each other, so that copies go and move
    for seed in range(3):
        counts = drawn(slots, seed)
        expected = one_by_one(plan, counts, COSTS[costs])
        plan = flexmoe.propose(plan, counts, COSTS[costs])
        assert plan == expected


def test_a_search_over_many_experts_weighs_all_changes_of_a_plan_at_once(monkeypatch):
    slots, weighed = Slots(64, 8, 4), []
    stock = flexmoe._Changes.weighed

    def counted(self, rows, load, costs, numbers):
        weighed.append(len(numbers))
        return stock(self, rows, load, costs, numbers)

    monkeypatch.setattr(flexmoe._Changes, "weighed", counted)
    plan = flexmoe.propose(SlotPlan.empty(slots), drawn(slots, 0), SlotCosts(1.0, 0.3, 20.0))
    assert plan.copies
    assert sum(weighed) > 100 * len(weighed)
