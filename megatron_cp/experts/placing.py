"""When a layer's plan of copies changes: counts of some steps, then a plan for the steps after them."""

from megatron_cp.experts import ExpertPlacement
from megatron_cp.experts.slots import Counts, SlotCosts, SlotPlan, Slots, observed


class ChangingPlan:
    """One layer's plan and what its policy goes by; ranks that are told the same counts have the same plan.

    interval: steps between plans
    plan:     the one in force, at first without copies
    """

    def __init__(self, entry: ExpertPlacement, slots: Slots, interval: int) -> None:
        self.interval, self.plan = interval, SlotPlan.empty(slots)
        self._propose, self._keep = entry.load(), entry.keep
        self._past: Counts | None = None

    def due(self, steps: int) -> bool:
        """Return True if it is time for a plan, so many steps after the last one."""
        return steps >= self.interval

    def change(self, counts: Counts, costs: SlotCosts) -> SlotPlan:
        """Return the plan from now on.

        counts: rows of each rank for each expert in a step, the mean of the steps since the last plan
        costs:  of a step
        """
        self._past = observed(self._past, counts, self._keep)
        self.plan = self._propose(self.plan, self._past, costs)
        return self.plan
