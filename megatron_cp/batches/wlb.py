"""WLB-LLM: one degree for all, microbatches of like work, and long documents that wait for others (arXiv:2503.17924).

Inside a group every document is cut over all ranks (the paper's sharding per document), so that a group's ranks have
equal work; the package's layout `document` does that.
"""

from bisect import bisect_right
from collections.abc import Sequence

from megatron_cp.batches.assign import assign, groups_of
from megatron_cp.batches.plan import Share
from megatron_cp.batches.problem import BatchProblem
from megatron_cp.batches.static import shortest, static_degree

NAME = "wlb"
LEVELS = (0.25, 0.5)
"""Lengths, as parts of what a microbatch holds, from which documents wait in a queue of their own."""


def wlb(problem: BatchProblem) -> list[tuple[Share, ...]]:
    """Return slots of equal groups, with like work in each (4.1: attention and linear work together)."""
    degree = static_degree(problem)
    replicas = groups_of(problem, degree)

    def divide(count: int) -> Sequence[Share] | None:
        split = assign(problem, problem.longest_first, [degree] * count, problem.lengths)
        return split and split.shares

    return shortest(NAME, problem, replicas, divide)


def delayed(lengths: Sequence[int], batches: Sequence[Sequence[int]], holds: int) -> list[list[int]]:
    """Return the documents of each step with outliers kept back until every microbatch gets one (4.2).

    lengths: of all documents, which `batches` names by their index
    holds:   tokens of a microbatch
    Documents that still wait after the last step are run in it.
    """
    levels = [round(holds * level) for level in LEVELS]
    queues: list[list[int]] = [[] for _ in levels]
    found = []
    for batch in batches:
        count = max(1, -(-sum(lengths[at] for at in batch) // holds))
        now: list[int] = []
        for at in batch:
            level = bisect_right(levels, lengths[at])
            (queues[level - 1] if level else now).append(at)
        for queue in queues:
            # one for every microbatch, the oldest first
            ready = len(queue) // count * count
            now += queue[:ready]
            del queue[:ready]
        found.append(now)
    found[-1] += [at for queue in queues for at in queue]
    return [step for step in found if step]
