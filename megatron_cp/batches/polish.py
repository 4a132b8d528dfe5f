"""Improve the plan of few documents: move one, or swap two, between slots and groups as long as the step shortens."""

from collections.abc import Callable, Iterator, Sequence

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
