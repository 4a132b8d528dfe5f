"""Shorten the step of few documents: all slots are made anew where that is quick, else some at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations

from megatron_cp.batches.plan import Share, placed
from megatron_cp.batches.problem import BatchProblem
from megatron_cp.batches.subsets import shortest, steps

FEW = 24
"""Documents of a step up to which this is tried; with more of them the plans leave little."""
STEPS = 40_000_000
"""Entries of tables that are compared at most, about half a second."""
SET, LOOK = 40_000, 500
"""Entries that are compared in the time that a set of slots takes besides, and one that was tried before."""
BETTER = 1 - 1e-9

type Slots = Sequence[Sequence[Share]]


def polished(name: str, problem: BatchProblem, slots: Slots) -> Slots:
    """Return these slots, or those of a shorter step."""
    if steps(problem, len(problem.lengths)) <= STEPS:
        found = shortest(problem)
        # a step whose ranks do not begin every slot together may be shorter as it is
        return slots if found is None else min(slots, found, key=lambda slots: placed(name, problem, slots).seconds)
    best, left = (placed(name, problem, slots).seconds, slots), STEPS
    tried: set[tuple[int, ...]] = set()
    going_on = True
    while going_on:
        going_on = False
        for some in _sets(len(best[1])):
            documents = tuple(sorted(at for slot in some for share in best[1][slot] for at in share.documents))
            left -= LOOK
            if left < 0:
                break
            cost = SET + steps(problem, len(documents))
            if documents in tried or cost > left:
                continue
            tried.add(documents)
            left -= cost
            anew = _anew(problem, documents)
            if not anew:
                continue
            moved = [*(slot for at, slot in enumerate(best[1]) if at not in some), *anew]
            seconds = placed(name, problem, moved).seconds
            if seconds < BETTER * best[0]:
                best, going_on = (seconds, moved), True
                break
    return best[1]


def _sets(slots: int) -> Iterator[tuple[int, ...]]:
    """Yield any two slots, then any three and so on."""
    for size in range(2, slots):
        yield from combinations(range(slots), size)


def _anew(problem: BatchProblem, documents: Sequence[int]) -> Sequence[Sequence[Share]]:
    """Return the slots of these documents that are shortest together; none where the groups of one have no place."""
    some = replace(problem, lengths=tuple(problem.lengths[at] for at in documents), multiple=1)
    return [
        [Share(share.degree, tuple(documents[at] for at in share.documents)) for share in slot]
        for slot in shortest(some) or ()
    ]
