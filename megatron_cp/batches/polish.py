"""Improve the plan of few documents: move one, or swap two, between slots and groups as long as the step shortens."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, combinations

from megatron_cp.batches.assign import Split
from megatron_cp.batches.plan import Share, placed
from megatron_cp.batches.problem import BatchProblem

FEW = 12
"""Documents of a step up to which this is tried; with more of them the plans leave little."""
TRIES = 60
"""Slots for whose documents groups are looked for, at most."""
BETTER = 1 - 1e-9

type Slots = Sequence[Sequence[Share]]
type Solve = Callable[[Sequence[int]], Split | None]


def polished(name: str, problem: BatchProblem, slots: Slots, solve: Solve) -> Slots:
    """Return these slots, or those of a shorter step with documents moved between them.

    solve: returns the groups of one slot for its documents, longest first; None where they have no room in it
    """
    sets = [tuple(at for at in problem.longest_first if at in _held(slot)) for slot in slots]
    known: dict[tuple[int, ...], Split | None] = {}

    def step(sets: Sequence[tuple[int, ...]]) -> tuple[float, Slots] | None:
        for each in sets:
            if each and each not in known:
                known[each] = solve(each)
        splits = [known[each] for each in sets if each]
        found = [split.shares for split in splits if split]
        return (placed(name, problem, found).seconds, found) if len(found) == len(splits) else None

    best, going_on = (placed(name, problem, slots).seconds, slots), True
    if (again := step(sets)) and again[0] < best[0]:
        best = again
    while going_on:
        going_on = False
        for moved in _moves(problem, sets):
            if len(known) >= TRIES:
                return best[1]
            tried = step(moved)
            if tried and tried[0] < BETTER * best[0]:
                best, sets, going_on = tried, moved, True
                break
    return best[1]


def _held(slot: Sequence[Share]) -> set[int]:
    return {at for share in slot for at in share.documents}


def _moves(problem: BatchProblem, sets: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Yield the documents of all slots with one in another slot, or two exchanged."""
    for here, mine in enumerate(sets):
        for there, theirs in enumerate(sets):
            for at in mine if here != there else ():
                for back in (None, *(theirs if here < there else ())):
                    moved = list(sets)
                    moved[here] = tuple(one for one in problem.longest_first if one in {*mine, back} - {at})
                    moved[there] = tuple(one for one in problem.longest_first if one in {*theirs, at} - {back})
                    yield moved


def exchanged(problem: BatchProblem, split: Split) -> Split:
    """Return the split with documents of its slowest group moved or swapped until it gets no faster."""
    shares = list(split.shares)

    def seconds(share: Share) -> float:
        lengths = [problem.lengths[at] for at in share.documents]
        rate = problem.rate[share.degree]
        return rate.seconds(sum(lengths), sum(length * length for length in lengths)) if lengths else 0.0

    while True:
        times = [seconds(share) for share in shares]
        slow = max(range(len(shares)), key=times.__getitem__)
        for there, ours, theirs in _pairs(problem, shares, slow):
            one, other = Share(shares[slow].degree, ours), Share(shares[there].degree, theirs)
            if max(seconds(one), seconds(other)) < BETTER * times[slow]:
                shares[slow], shares[there] = one, other
                break
        else:
            return Split(times[slow], tuple(shares))


def _pairs(
    problem: BatchProblem, shares: Sequence[Share], slow: int
) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Yield a group and the documents of the slow one and its own after a move or a swap, where there is room."""
    degree, mine = shares[slow]
    for there, (other, theirs) in enumerate(shares):
        for out in _few(mine) if there != slow else ():
            for back in ((), *_few(theirs)):
                ours, others = _without(mine, out) + back, _without(theirs, back) + out
                if _fits(problem, degree, ours) and _fits(problem, other, others):
                    yield there, ours, others


def _few(documents: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yield each document alone, and each two."""
    return chain(combinations(documents, 1), combinations(documents, 2))


def _without(documents: tuple[int, ...], left_out: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(at for at in documents if at not in left_out)


def _fits(problem: BatchProblem, degree: int, documents: tuple[int, ...]) -> bool:
    return sum(problem.lengths[at] for at in documents) <= degree * problem.capacity
