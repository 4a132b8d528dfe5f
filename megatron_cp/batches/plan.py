"""The plan of a batch: for every slot, groups that cover the ranks and their documents; its checks and digest."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from megatron_cp.batches.place import place
from megatron_cp.batches.problem import BatchProblem
from megatron_cp.batches.timing import GroupLoad, GroupSpan, group_seconds, lower_bound, spans, step_seconds


class RankGroup(NamedTuple):
    """Ranks first, first + 1, … of one slot, and the documents that they run together; without any, a pad."""

    first: int
    degree: int
    documents: tuple[int, ...]

    @property
    def ranks(self) -> range:
        """Ranks of the group."""
        return range(self.first, self.first + self.degree)


class Share(NamedTuple):
    """A group as an algorithm gives it, before it has a place: its degree and its documents."""

    degree: int
    documents: tuple[int, ...]


type Slot = tuple[RankGroup, ...]


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Slots of a batch in the order in which every rank and every pipeline stage runs them.

    algorithm: name in the registry
    slots:     groups by their first rank
    """

    algorithm: str
    problem: BatchProblem
    slots: tuple[Slot, ...]

    @cached_property
    def seconds(self) -> float:
        """Seconds of the step."""
        return step_seconds(self.problem, self._loads) + self.problem.after

    @cached_property
    def spans(self) -> list[list[GroupSpan]]:
        """When each group of each slot runs, on one pipeline stage that does not wait for others."""
        return spans(self.problem, self._loads)

    @cached_property
    def _loads(self) -> list[list[GroupLoad]]:
        return [[GroupLoad(group.ranks, self.group_seconds(group)) for group in slot] for slot in self.slots]

    def group_seconds(self, group: RankGroup) -> float:
        """Return the seconds of a group on a stage."""
        lengths = [self.problem.lengths[at] for at in group.documents]
        return group_seconds(self.problem, group.degree, sum(lengths), sum(length * length for length in lengths))

    @cached_property
    def bound(self) -> float:
        """Seconds that no plan of these documents can go below."""
        return lower_bound(self.problem)

    @property
    def gap(self) -> float:
        """Share by which the step exceeds the lower bound."""
        return self.seconds / self.bound - 1

    @property
    def degrees(self) -> Counter[int]:
        """Number of groups with documents, by degree."""
        return Counter(group.degree for slot in self.slots for group in slot if group.documents)

    def group_of(self, slot: int, rank: int) -> RankGroup:
        """Return the group of a rank in a slot."""
        return next(group for group in self.slots[slot] if rank in group.ranks)

    @cached_property
    def digest(self) -> str:
        """Digest of the problem and the slots, equal on two ranks if and only if they run the same step."""
        return hashlib.sha256(repr((self.algorithm, self.problem, self.slots)).encode()).hexdigest()


def placed(algorithm: str, problem: BatchProblem, slots: Sequence[Sequence[Share]]) -> BatchPlan:
    """Return the plan with a place for every group, and ranks without documents in groups of their own.

    Slots without documents are left out, and added until the number of slots is a multiple of the problem's. Raises
    AssertionError for groups that do not fit the ranks, and for a plan that breaks a rule of `check_plan`.
    """
    rows = [_placed_slot(problem, slot) for slot in slots if any(share.documents for share in slot)]
    rows += [_placed_slot(problem, [])] * (-len(rows) % problem.multiple)
    plan = BatchPlan(algorithm=algorithm, problem=problem, slots=tuple(rows))
    check_plan(plan)
    return plan


def _placed_slot(problem: BatchProblem, slot: Sequence[Share]) -> Slot:
    first = place([share.degree for share in slot], problem.ranks, problem.per_node)
    assert first is not None, f"{problem.ranks} ranks have no room for groups of {[share.degree for share in slot]}"
    groups = [RankGroup(start, *share) for start, share in zip(first, slot, strict=True) if share.documents]
    busy = {rank for group in groups for rank in group.ranks}
    groups += [RankGroup(rank, 1, ()) for rank in range(problem.ranks) if rank not in busy]
    return tuple(sorted(groups))


def check_plan(plan: BatchPlan) -> None:
    """Raise AssertionError unless the plan can run: every document once, each rank once in each slot, memory, bound."""
    problem = plan.problem
    documents = [at for slot in plan.slots for group in slot for at in group.documents]
    assert sorted(documents) == [*range(len(problem.lengths))], "a plan holds every document once"
    assert len(plan.slots) % problem.multiple == 0, "the number of slots is a multiple of the problem's"
    empty = sum(not any(group.documents for group in slot) for slot in plan.slots)
    assert empty < problem.multiple, f"{empty} slots hold no documents"
    for slot in plan.slots:
        ranks = [rank for group in slot for rank in group.ranks]
        assert ranks == [*range(problem.ranks)], "the groups of a slot cover every rank once"
        for group in slot:
            tokens = sum(problem.lengths[at] for at in group.documents)
            assert not tokens or group.degree in problem.rate, f"no group of {group.degree} ranks may be formed"
            assert tokens <= group.degree * problem.capacity, f"{tokens} tokens do not fit {group.degree} ranks"
            inside = group.first % problem.per_node + group.degree <= max(group.degree, problem.per_node)
            assert inside, f"a group of {group.degree} ranks lies over the end of a node"
    # sums of floats differ in their last digits by the order of the terms
    assert plan.seconds >= plan.bound * (1 - 1e-9), f"{plan.seconds} s are below the bound of {plan.bound} s"
