"""Plan the steps of a run one after the other, with documents that an algorithm keeps for a later step."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_cp.batches import BatchAlgorithm
from megatron_cp.batches.plan import BatchPlan, placed
from megatron_cp.batches.problem import BatchProblem
from megatron_cp.batches.static import static_degree
from megatron_cp.batches.wlb import delayed


@dataclass(frozen=True)
class PlannedSteps:
    """Steps of one algorithm.

    documents: of each step, by their place in the order of the run
    plans:     of each step; its documents are numbered from 0
    """

    algorithm: str
    documents: tuple[tuple[int, ...], ...]
    plans: tuple[BatchPlan, ...]

    @property
    def seconds(self) -> float:
        """Seconds of all steps."""
        return sum(plan.seconds for plan in self.plans)

    @property
    def bound(self) -> float:
        """Seconds that no plans of these steps can go below."""
        return sum(plan.bound for plan in self.plans)

    @property
    def degrees(self) -> Counter[int]:
        """Number of groups with documents, by degree."""
        return sum((plan.degrees for plan in self.plans), Counter())


def plan_batch(algorithm: BatchAlgorithm, problem: BatchProblem) -> BatchPlan:
    """Return the checked plan of an algorithm; equal arguments give equal plans on every rank."""
    return placed(algorithm.name, problem, algorithm.load()(problem))


def plan_steps(algorithm: BatchAlgorithm, problem: BatchProblem, batches: Sequence[Sequence[int]]) -> PlannedSteps:
    """Return the plan of each batch; `batches` names the documents of the problem by their place."""
    steps: Sequence[Sequence[int]] = batches
    if algorithm.delays:
        steps = delayed(problem.lengths, batches, static_degree(problem) * problem.capacity)
    plans = tuple(
        plan_batch(algorithm, replace(problem, lengths=tuple(problem.lengths[at] for at in step))) for step in steps
    )
    return PlannedSteps(algorithm.name, tuple(tuple(step) for step in steps), plans)
