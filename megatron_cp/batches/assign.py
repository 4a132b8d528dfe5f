"""Assign documents to the groups of one slot: longest first, each to the group that then ends first."""

import heapq
from collections.abc import Sequence
from math import inf
from typing import NamedTuple

from megatron_cp.batches.plan import Share
from megatron_cp.batches.problem import BatchProblem


class Split(NamedTuple):
    """Groups of one slot with their documents, and the seconds of the slowest."""

    seconds: float
    shares: tuple[Share, ...]


def assign(
    problem: BatchProblem, documents: Sequence[int], degrees: Sequence[int], lengths: Sequence[int]
) -> Split | None:
    """Return documents, given longest first, in groups of these degrees; None where a document finds no room.

    lengths: by which documents are weighed, at least their own
    """
    heaps: dict[int, list[tuple[float, int, int, int]]] = {}
    for index, degree in enumerate(degrees):
        heaps.setdefault(degree, []).append((problem.rate[degree].fixed, index, 0, 0))
    rows = [(problem.rate[degree], degree * problem.capacity, heap) for degree, heap in heaps.items()]
    held: list[list[int]] = [[] for _ in degrees]
    for at in documents:
        length = lengths[at]
        square = length * length
        best, chosen = inf, None
        for rate, room, heap in rows:
            if heap[0][0] >= best or length > room:
                continue
            place = 0
            if heap[0][2] + length > room:
                with_room = [(group, place) for place, group in enumerate(heap) if group[2] + length <= room]
                if not with_room:
                    continue
                place = min(with_room)[1]
            _, index, tokens, squares = heap[place]
            seconds = rate.seconds(tokens + length, squares + square)
            if seconds < best:
                best, chosen = seconds, (heap, place, (seconds, index, tokens + length, squares + square))
        if chosen is None:
            return None
        heap, place, group = chosen
        if place == 0:
            heapq.heapreplace(heap, group)
        else:
            heap[place] = group
            heapq.heapify(heap)
        held[group[1]].append(at)
    slowest = max((group[0] for heap in heaps.values() for group in heap if held[group[1]]), default=0.0)
    shares = tuple(Share(degree, tuple(each)) for degree, each in zip(degrees, held, strict=True))
    return Split(slowest, shares)


def homogeneous_splits(
    problem: BatchProblem, documents: Sequence[int], degrees: Sequence[int], lengths: Sequence[int]
) -> list[Split]:
    """Return a split for every degree of which as many groups as there is room for hold the documents."""
    found = [
        assign(problem, documents, [degree] * groups_of(problem, degree), lengths)
        for degree in degrees
        if degree * problem.capacity >= max(lengths[at] for at in documents)
    ]
    return [split for split in found if split]


def groups_of(problem: BatchProblem, degree: int) -> int:
    """Return how many groups of one degree a slot has room for, without one over the end of a node."""
    if degree <= problem.per_node:
        whole, rest = divmod(problem.ranks, problem.per_node)
        return whole * (problem.per_node // degree) + rest // degree
    return problem.ranks // (-(-degree // problem.per_node) * problem.per_node) or 1
