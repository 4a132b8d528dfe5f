"""The best splits that a search has found, and lines on why they are."""

from collections import Counter
from dataclasses import dataclass, field

from megatron_cp.experts.dispatch_cost import STOCK
from megatron_cp.planner.dispatch import dispatch_why
from megatron_cp.planner.estimate import IN_WORDS, Estimate, Parts
from megatron_cp.planner.parallel import Parallel
from megatron_cp.planner.placements import placement_why
from megatron_cp.planner.plan_request import PlanRequest
from megatron_cp.planner.variants import cheapest_scheme, without_savings
from megatron_cp.tensor import MEGATRONS

AS_FAST = 0.01
MUCH_SMALLER = 0.85
"""A plan that takes at most 1 % longer with at most 85 % of the best plan's memory is named beside it."""


@dataclass(frozen=True)
class Plans:
    """Best split for each combination of parallel sizes, fastest first.

    left_out: number of splits that each rule has excluded
    examined: number of splits with a bound
    """

    request: PlanRequest
    options: tuple[Estimate, ...]
    left_out: Counter[str] = field(default_factory=Counter)
    examined: int = 0

    @property
    def best(self) -> Estimate:
        return self.options[0]

    @property
    def tensor_why(self) -> str:
        """One line on the tensor-parallel scheme of the best plan; empty where there was no choice."""
        chosen = cheapest_scheme(self.request, without_savings(self.best.parallel))
        if chosen is None:
            return ""
        kept = (
            ""
            if chosen.placing.scheme == MEGATRONS or self.best.parallel.tp_scheme != MEGATRONS
            else (f"; its weights leave no memory, so {MEGATRONS} stays")
        )
        return f"of tensor-parallel schemes {chosen.why}{kept}"

    @property
    def experts_why(self) -> list[str]:
        """Lines on the ways of tokens to experts in the best plan, and on copies of experts; none for a dense model."""
        if not self.best.model.experts:
            return []
        rank, request = self.best.rank, self.request
        lines = dispatch_why(rank, request.exchanges, request.pieces), placement_why(self.best)
        return [line for line in lines if line]

    @property
    def smaller(self) -> Estimate | None:
        """The plan of least memory that is as fast as the best one but much smaller; None if there is none."""
        most = MUCH_SMALLER * self.best.worst_memory.total
        near = [one for one in self.options if one.seconds <= (1 + AS_FAST) * self.best.seconds]
        least = min(near, key=lambda one: one.worst_memory.total)
        return least if least.worst_memory.total <= most else None

    @property
    def why(self) -> str:
        """One line on the bottleneck of the best plan, and on the reason why the second one is slower."""
        line = f"{label(self.best.parallel)} is bound by {self.best.bound_by}"
        if len(self.options) == 1:
            return line
        second = self.options[1]
        lost = {name: getattr(second.parts, name) - getattr(self.best.parts, name) for name in Parts._fields}
        most = max(lost, key=lambda name: lost[name])
        slower = second.seconds / self.best.seconds - 1
        if lost[most] <= 0:
            return f"{line}; {label(second.parallel)} is as fast"
        here, there = (getattr(one.parts, most) for one in (self.best, second))
        return (
            f"{line}; {label(second.parallel)} takes {100 * slower:.1f}% longer, most of it for {IN_WORDS[most]}: "
            f"{there:.3g} s a step against {here:.3g} s"
        )


def label(parallel: Parallel) -> str:
    """Return a short text that names a split."""
    scheme = "" if parallel.tp_scheme == MEGATRONS else f" ({parallel.tp_scheme}"
    of_grid = f" {parallel.tp_grid[0]}x{parallel.tp_grid[1]}" if parallel.tp_grid else ""
    words = [f"TP={parallel.tp}" + (f"{scheme}{of_grid})" if scheme else "")]
    if parallel.cp > 1:
        grid = f" {parallel.grid.inner}x{parallel.grid.outer}" if parallel.grid else ""
        words.append(f"CP={parallel.cp} ({parallel.backend}{grid})")
    if parallel.pp > 1:
        chunks = f" v={parallel.vp}" if parallel.vp > 1 else ""
        words.append(f"PP={parallel.pp} ({parallel.schedule_name}{chunks})")
    of_tokens = f" ({parallel.dispatch})" if parallel.dispatch != STOCK else ""
    words += [f"DP={parallel.dp}"] + ([f"EP={parallel.ep}{of_tokens}"] if parallel.ep > 1 else [])
    copies = parallel.expert_copies
    words += [f"{copies.policy} {copies.slots}"] if copies.asked and parallel.ep > 1 else []
    words += [f"{parallel.slices} slices"] if parallel.slices > 1 else []
    words += [f"vocab parallel {parallel.barriers}"] if parallel.barriers else []
    words += [f"offload {parallel.moves.limit}"] if parallel.moves else []
    words += [f"micro batch {parallel.micro_batch}"] if parallel.micro_batch > 1 else []
    again = "full recompute" + (" but attention" if parallel.keep_attention else "")
    return " ".join(words + ([again] if parallel.recompute == "full" else []))
