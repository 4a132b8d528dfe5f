"""Branch and bound over the groups of one slot of few documents, for groups that are full but for a few tokens.

Documents are taken longest first. Each joins a group or opens one, and every group has the smallest degree that holds
its documents within a time limit. A branch ends where the degrees exceed the ranks. The limit is the time of the
fastest groups so far.
"""

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

from megatron_cp.batches.assign import Split
from megatron_cp.batches.place import place
from megatron_cp.batches.plan import Share
from megatron_cp.batches.polish import BETTER
from megatron_cp.batches.problem import BatchProblem

NODES = 1000
"""Documents that are given a group in one search, at most."""


def branched(problem: BatchProblem, documents: Sequence[int], known: Split | None) -> Split | None:
    """Return faster groups for the documents of a slot, longest first, or `known` where none are found."""
    best, search = known, _Search(problem, documents)
    while groups := search.within(best.seconds * BETTER if best else inf):
        shares = tuple(Share(group.degree, group.documents) for group in groups)
        best = Split(max(problem.rate[group.degree].seconds(group.tokens, group.squares) for group in groups), shares)
    return best


class _Group(NamedTuple):
    degree: int
    tokens: int
    squares: int
    documents: tuple[int, ...]


EMPTY = _Group(0, 0, 0, ())


class _Search:
    """A search for groups within a time, whose nodes are counted over all limits that are tried."""

    def __init__(self, problem: BatchProblem, documents: Sequence[int]) -> None:
        self._problem, self._documents = problem, documents
        self._nodes, self._limit = NODES, 0.0

    def within(self, limit: float) -> tuple[_Group, ...] | None:
        """Return groups of which each ends before `limit`; None if there are none, or no nodes are left."""
        self._limit = limit
        return self._below((), self._problem.ranks)

    def _below(self, groups: tuple[_Group, ...], free: int) -> tuple[_Group, ...] | None:
        """Return groups for all documents that begin with these, which leave `free` ranks."""
        given = sum(len(group.documents) for group in groups)
        if given == len(self._documents):
            degrees = [group.degree for group in groups]
            return groups if place(degrees, self._problem.ranks, self._problem.per_node) is not None else None
        branches: dict[tuple[int, int, int], tuple[int, int, _Group]] = {}
        for at, group in enumerate((*groups, EMPTY)):
            grown = self._grown(group, self._documents[given])
            if grown and grown.degree - group.degree <= free:
                # equal groups are interchangeable
                branches.setdefault(
                    (grown.degree, grown.tokens, grown.squares), (grown.degree - group.degree, at, grown)
                )
        for more, at, grown in sorted(branches.values()):
            if self._nodes == 0:
                return None
            self._nodes -= 1
            if found := self._below((*groups[:at], grown, *groups[at + 1 :]), free - more):
                return found
        return None

    def _grown(self, group: _Group, document: int) -> _Group | None:
        """Return the group with one more document and the smallest degree for it; None if there is none."""
        length = self._problem.lengths[document]
        tokens, squares = group.tokens + length, group.squares + length * length
        for degree in self._problem.degrees:
            if degree < group.degree or degree * self._problem.capacity < tokens:
                continue
            if self._problem.rate[degree].seconds(tokens, squares) < self._limit:
                return _Group(degree, tokens, squares, (*group.documents, document))
        return None
