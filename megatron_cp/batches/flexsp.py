"""FlexSP: groups of unequal degree in every slot (arXiv:2412.01523).

Documents are sorted and cut into slots (4.2), bucketed by length (4.1.3), and in each slot assigned to groups whose
degrees are powers of two, so that the slowest group is as fast as possible (4.1.2). The paper solves the assignment as
a mixed-integer program; here splits of the ranks are searched, and documents of each are assigned longest first.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from megatron_cp.batches.assign import Split, assign, groups_of
from megatron_cp.batches.blast import consecutive, possible
from megatron_cp.batches.buckets import boundaries, rounded
from megatron_cp.batches.place import place
from megatron_cp.batches.plan import Share, placed
from megatron_cp.batches.problem import BatchProblem

NAME = "flexsp"
BUCKETS = 16
"""Buckets at first; more where padding to their boundaries takes more than half of what memory leaves."""


def flexsp(problem: BatchProblem) -> list[tuple[Share, ...]]:
    """Return the slots of FlexSP's plan: the shortest step of several numbers of slots (4.2)."""
    found = possible(problem, lambda count: _slots(problem, consecutive(problem, count)))
    return min(found, key=lambda slots: placed(NAME, problem, slots).seconds)


def _slots(problem: BatchProblem, divided: Sequence[Sequence[int]] | None) -> list[tuple[Share, ...]] | None:
    """Return the best split of each slot; None where a slot has none."""
    degrees = problem.doubling
    splits = [best_split(problem, slot, degrees, bucketed(problem, slot)) for slot in divided or ()]
    return [split.shares for split in splits if split] if splits and all(splits) else None


def bucketed(problem: BatchProblem, documents: Sequence[int]) -> list[int]:
    """Return every document's length, those of one slot rounded up to the boundaries of their buckets."""
    lengths = [problem.lengths[at] for at in documents]
    room = problem.ranks * problem.capacity
    buckets, most = BUCKETS, (sum(lengths) + room) // 2
    upper = rounded(lengths, boundaries(lengths, buckets))
    while sum(upper) > most and buckets < len(lengths):
        buckets *= 2
        upper = rounded(lengths, boundaries(lengths, buckets))
    # a boundary beyond the largest group would leave a document without one
    found = list(problem.lengths)
    for at, length in zip(documents, upper, strict=True):
        found[at] = length
    return found


def best_split(
    problem: BatchProblem,
    documents: Sequence[int],
    degrees: Sequence[int],
    lengths: Sequence[int],
) -> Split | None:
    """Return the split whose slowest group is fastest, by search; None where no split that is tried has room.

    First equal groups of each degree, and some large groups beside small ones. Then, from the best, one group halved
    or two joined, as long as that helps.
    """
    tried: set[tuple[int, ...]] = set()

    def fastest(candidates: Iterable[Sequence[int]], best: Split | None) -> Split | None:
        for candidate in candidates:
            split_of = tuple(sorted(candidate, reverse=True))
            if split_of in tried:
                continue
            found = None
            if place(split_of, problem.ranks, problem.per_node) is not None:
                found = assign(problem, documents, split_of, lengths)
            tried.add(split_of)
            if found and (best is None or found.seconds < best.seconds):
                best = found
        return best

    best = fastest(starts(problem, degrees), None)
    while best and (better := fastest(neighbours(best, degrees), best)) is not best:
        best = better
    return best


def starts(problem: BatchProblem, degrees: Sequence[int]) -> Iterator[list[int]]:
    """Yield splits of the ranks into equal groups, and into some large groups with small ones in the rest."""
    for large in degrees:
        most = groups_of(problem, large)
        yield [large] * most
        for small in degrees:
            if small < large:
                for number in sorted({1, 2, most // 4, most // 2, 3 * most // 4} - {0}):
                    if number <= most:
                        yield [large] * number + [small] * ((problem.ranks - number * large) // small)


def neighbours(split: Split, degrees: Sequence[int]) -> Iterator[list[int]]:
    """Yield the split with one group halved, or with two equal ones joined."""
    groups = [share.degree for share in split.shares]
    for small, large in pairwise(degrees):
        if large != 2 * small:
            continue
        if large in groups:
            rest = list(groups)
            rest.remove(large)
            yield [*rest, small, small]
        if groups.count(small) > 1:
            rest = list(groups)
            rest.remove(small)
            rest.remove(small)
            yield [*rest, large]
