"""The shortest step of few documents, by dynamic programming over all sets of documents (Held and Karp, 1962).

Three tables, each of one entry for every set: the seconds of a group of each degree, those of the fastest groups that
share so many ranks, and those of the fastest slots.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from math import comb
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_cp.batches.place import place
from megatron_cp.batches.plan import Share
from megatron_cp.batches.problem import BatchProblem

type Seconds = NDArray[np.float64]


class _Parts(NamedTuple):
    """For every set but the empty one, smaller ones before larger ones, its parts that hold its first document.

    sets:   as bits
    first:  where the parts of each set begin
    parts:  as bits
    rest:   what is left of the set
    layers: the sets of equally many documents, from 1 on
    """

    sets: NDArray[np.int64]
    first: NDArray[np.int64]
    parts: NDArray[np.int64]
    rest: NDArray[np.int64]
    layers: tuple[slice, ...]


@lru_cache(12)
def _parts(documents: int) -> _Parts:
    sets = sorted(range(1, 1 << documents), key=int.bit_count)
    parts: list[NDArray[np.int64]] = []
    rest: list[NDArray[np.int64]] = []
    for whole in sets:
        lowest = whole & -whole
        inside = np.array([lowest])
        for at in range(documents):
            if (whole ^ lowest) >> at & 1:
                inside = np.concatenate([inside, inside | 1 << at])
        parts.append(inside)
        rest.append(whole ^ inside)
    first = np.cumsum([0, *(len(each) for each in parts)])
    ends = [0, *accumulate(comb(documents, size) for size in range(1, documents + 1))]
    layers = tuple(slice(start, stop) for start, stop in pairwise(ends))
    return _Parts(np.array(sets), first, np.concatenate(parts), np.concatenate(rest), layers)


def steps(problem: BatchProblem, documents: int) -> int:
    """Return how many entries of tables `shortest` compares for so many documents; 100 million take about a second."""
    pairs = sum(1 for ranks in range(1, problem.ranks + 1) for degree in problem.degrees if degree <= ranks)
    return pairs * 3**documents // 2


def shortest(problem: BatchProblem) -> Sequence[Sequence[Share]] | None:
    """Return the slots whose seconds add up to the least; None where their groups would lie over the end of a node.

    A step whose ranks do not begin every slot together may be shorter.
    """
    found = _Tables(problem)
    slots = [tuple(found.groups(whole)) for whole in found.slots()]
    if any(place([share.degree for share in slot], problem.ranks, problem.per_node) is None for slot in slots):
        return None
    return slots


class _Tables:
    def __init__(self, problem: BatchProblem) -> None:
        self._problem = problem
        self._parts = _parts(len(problem.lengths))
        self._all = (1 << len(problem.lengths)) - 1
        tokens, squares = (self._sums([length**power for length in problem.lengths]) for power in (1, 2))
        self._alone = {degree: self._of_a_group(degree, tokens, squares) for degree in problem.degrees}
        # of every number of ranks; a slot has all
        self._together: list[Seconds] = [self._nothing()]
        for ranks in range(1, problem.ranks + 1):
            self._together.append(self._of_groups(ranks))

    def _sums(self, values: Sequence[int]) -> Seconds:
        """Return the sum over each set of documents."""
        found = np.zeros(1)
        for value in values:
            found = np.concatenate([found, found + value])
        return found

    def _nothing(self) -> Seconds:
        """Return seconds of each set where only the empty one is possible."""
        found = np.full(self._all + 1, np.inf)
        found[0] = 0.0
        return found

    def _of_a_group(self, degree: int, tokens: Seconds, squares: Seconds) -> Seconds:
        rate = self._problem.rate[degree]
        found = rate.fixed + rate.token * tokens + np.maximum(rate.square * squares, rate.exchange * tokens)
        found[tokens > degree * self._problem.capacity] = np.inf
        found[0] = 0.0
        return found

    def _of_groups(self, ranks: int) -> Seconds:
        """Return the seconds of each set in groups of `ranks` together: one with its first document, and others."""
        of = self._parts
        best = np.full(len(of.parts), np.inf)
        for degree in self._problem.degrees:
            if degree <= ranks:
                others = self._together[ranks - degree]
                np.minimum(best, np.maximum(self._alone[degree][of.parts], others[of.rest]), out=best)
        found = self._nothing()
        found[of.sets] = np.minimum.reduceat(best, of.first[:-1])
        return found

    def groups(self, whole: int) -> Iterator[Share]:
        """Yield the groups of a slot with these documents."""
        ranks, limit = self._problem.ranks, self._together[-1][whole]
        while whole:
            parts, rest = self._parts_of(whole)
            degree, at = next(
                (degree, at)
                for degree in self._problem.degrees
                if degree <= ranks
                for at in np.flatnonzero(
                    np.maximum(self._alone[degree][parts], self._together[ranks - degree][rest]) <= limit
                )
            )
            yield Share(degree, self._documents(int(parts[at])))
            whole, ranks = int(rest[at]), ranks - degree

    def slots(self) -> list[int]:
        """Return the set of each slot; with empty ones their number is a multiple of the problem's."""
        of, multiple, slot = self._parts, self._problem.multiple, self._together[-1]
        # seconds by the number of slots, over multiples of the problem's
        table = [self._nothing(), *(np.full(self._all + 1, np.inf) for _ in range(multiple - 1))]
        for layer in of.layers:
            inside = slice(of.first[layer.start], of.first[layer.stop])
            begins = of.first[layer] - inside.start
            parts, rest = slot[of.parts[inside]], of.rest[inside]
            for count in range(multiple):
                table[count][of.sets[layer]] = np.minimum.reduceat(parts + table[count - 1][rest], begins)
        pad = self._problem.rate[self._problem.degrees[0]].fixed
        count = min(range(multiple), key=lambda count: table[count][self._all] + -count % multiple * pad)
        found, whole = [], self._all
        while whole:
            several, rest = self._parts_of(whole)
            found.append(int(several[np.argmin(slot[several] + table[count - 1][rest])]))
            whole, count = whole ^ found[-1], (count - 1) % multiple
        return found

    def _parts_of(self, whole: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        at = np.flatnonzero(self._parts.sets == whole)[0]
        inside = slice(self._parts.first[at], self._parts.first[at + 1])
        return self._parts.parts[inside], self._parts.rest[inside]

    def _documents(self, part: int) -> tuple[int, ...]:
        return tuple(at for at in self._problem.longest_first if part >> at & 1)
