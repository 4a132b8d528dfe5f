"""Divide a batch into slots before groups are chosen: FlexSP's sequence blaster (arXiv:2412.01523, 4.2), and a deal."""

import heapq
from collections.abc import Callable, Sequence
from itertools import count
from math import ceil

from megatron_cp.batches.problem import BatchProblem

FILLS = (1, 2, 4)
"""Slots for each pipeline stage that are tried: more of them fill a pipeline better."""


def least_count(problem: BatchProblem) -> int:
    """Return the slots that the tokens of the batch ask for."""
    return ceil(problem.tokens / (problem.ranks * problem.capacity))


def counts(problem: BatchProblem) -> list[int]:
    """Return numbers of slots to try: as few as memory may allow, an eighth and a quarter more, and for a pipeline."""
    least = least_count(problem)
    for_stages = [problem.stages * fill for fill in FILLS] if problem.stages > 1 else []
    return sorted(
        {least, ceil(least * 9 / 8), ceil(least * 5 / 4), *(number for number in for_stages if number > least)}
    )


def possible[T](problem: BatchProblem, divide: Callable[[int], T | None]) -> list[T]:
    """Return the batch divided into each number of slots to try; where none is possible, into the next that is."""
    numbers = counts(problem)
    found = [divided for number in numbers if (divided := divide(number)) is not None]
    more = count(numbers[-1] + 1)
    while not found:
        divided = divide(next(more))
        found = [] if divided is None else [divided]
    return found


def consecutive(problem: BatchProblem, slots: int) -> list[list[int]] | None:
    """Return documents sorted by length and cut into slots of about equal tokens; None where one gets more than fit.

    Documents of like length share a slot, so that one degree suits most of them. Each slot is longest first.
    """
    room, left = problem.ranks * problem.capacity, problem.tokens
    found: list[list[int]] = [[]]
    filled = 0
    for at in problem.longest_first:
        length, to_fill = problem.lengths[at], slots - len(found) + 1
        # a document goes where its middle lies
        if found[-1] and len(found) < slots and (filled + length / 2 > left / to_fill or filled + length > room):
            found.append([])
            left, filled = left - filled, 0
        found[-1].append(at)
        filled += length
        if filled > room:
            return None
    return found


def dealt(problem: BatchProblem, slots: int, work: Sequence[float]) -> list[list[int]] | None:
    """Return documents dealt to slots, longest first, each to the slot with least work so far; None without room.

    work: rank seconds of each document
    """
    room = problem.ranks * problem.capacity
    heap = [(0.0, slot, 0) for slot in range(slots)]
    found: list[list[int]] = [[] for _ in range(slots)]
    for at in problem.longest_first:
        aside = []
        while heap and heap[0][2] + problem.lengths[at] > room:
            aside.append(heapq.heappop(heap))
        if not heap:
            return None
        done, slot, tokens = heapq.heappop(heap)
        heapq.heappush(heap, (done + work[at], slot, tokens + problem.lengths[at]))
        found[slot].append(at)
        for each in aside:
            heapq.heappush(heap, each)
    return [slot for slot in found if slot]
