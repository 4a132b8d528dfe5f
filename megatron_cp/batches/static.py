"""One degree for all documents of a batch, as --context-parallel-size sets it: the baseline of every other plan.

Microbatches hold like numbers of tokens, as streams of packed documents do; their work is not looked at.
"""

import heapq
from collections.abc import Callable, Sequence

from megatron_cp.batches.assign import groups_of
from megatron_cp.batches.blast import possible
from megatron_cp.batches.plan import Share, placed
from megatron_cp.batches.problem import BatchProblem

NAME = "static"


def static(problem: BatchProblem) -> list[tuple[Share, ...]]:
    """Return slots of equal groups that hold the longest document, with like numbers of tokens in each group."""
    degree = static_degree(problem)
    replicas = groups_of(problem, degree)
    return shortest(NAME, problem, replicas, lambda count: _by_tokens(problem, degree, count))


def shortest(
    algorithm: str, problem: BatchProblem, replicas: int, divide: Callable[[int], Sequence[Share] | None]
) -> list[tuple[Share, ...]]:
    """Return the slots of the shortest step of several numbers of microbatches, which `divide` makes."""
    found = possible(problem, lambda slots: divide(slots * replicas))
    candidates = [in_turn(problem, shares, replicas) for shares in found]
    return min(candidates, key=lambda slots: placed(algorithm, problem, slots).seconds)


def static_degree(problem: BatchProblem) -> int:
    """Return the smallest degree that divides the ranks and holds the longest document, else the smallest of all."""
    floor = problem.floor(max(problem.lengths))
    dividing = [degree for degree in problem.degrees if degree >= floor and problem.ranks % degree == 0]
    return dividing[0] if dividing else floor


def _by_tokens(problem: BatchProblem, degree: int, count: int) -> list[Share] | None:
    """Return documents in microbatches, longest first, each to the one with fewest tokens; None without room."""
    heap = [(0, index) for index in range(count)]
    held: list[list[int]] = [[] for _ in range(count)]
    for at in problem.longest_first:
        tokens, index = heap[0]
        if tokens + problem.lengths[at] > degree * problem.capacity:
            return None
        heapq.heapreplace(heap, (tokens + problem.lengths[at], index))
        held[index].append(at)
    return [Share(degree, tuple(documents)) for documents in held]


def in_turn(problem: BatchProblem, shares: Sequence[Share], replicas: int) -> list[tuple[Share, ...]]:
    """Return slots of microbatches of like time; in each the longest goes to the replica with least work so far."""

    def seconds(share: Share) -> float:
        lengths = [problem.lengths[at] for at in share.documents]
        return problem.rate[share.degree].seconds(sum(lengths), sum(length**2 for length in lengths))

    ordered = sorted(shares, key=lambda share: -seconds(share))
    done = [0.0] * replicas
    found = []
    for start in range(0, len(ordered), replicas):
        free = sorted(range(replicas), key=lambda replica: done[replica])
        row = [Share(ordered[0].degree, ())] * replicas
        for replica, share in zip(free, ordered[start : start + replicas], strict=False):
            row[replica] = share
            done[replica] += seconds(share)
        found.append(tuple(row))
    return found
