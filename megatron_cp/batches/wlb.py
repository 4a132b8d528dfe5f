"""WLB-LLM: one degree for all, microbatches of like work, and long documents that wait for others (arXiv:2503.17924).

Inside a group every document is cut over all ranks (the paper's sharding per document), so that a group's ranks have
equal work; the package's layout `document` does that.
"""

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

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


type Lengths = Sequence[int] | NDArray[np.int64]


class OutlierQueues:
    """Queues of long documents, which wait until every microbatch of a step gets one (4.2).

    holds: tokens of a microbatch
    """

    def __init__(self, holds: int) -> None:
        self._holds = holds
        self._levels = [round(holds * level) for level in LEVELS]
        self._queues: list[list[int]] = [[] for _ in self._levels]

    def step(self, batch: Sequence[int], lengths: Lengths) -> list[int]:
        """Return the documents of the next step, whose batch has these; all that wait where none is ready.

        lengths: of all documents, by their numbers
        """
        count = max(1, -(-sum(int(lengths[at]) for at in batch) // self._holds))
        now: list[int] = []
        for at in batch:
            level = bisect_right(self._levels, lengths[at])
            (self._queues[level - 1] if level else now).append(at)
        for queue in self._queues:
            # one for every microbatch, the oldest first
            ready = len(queue) // count * count
            now += queue[:ready]
            del queue[:ready]
        return now or self.rest()

    def rest(self) -> list[int]:
        """Return the documents that wait, which then do so no more."""
        found = [at for queue in self._queues for at in queue]
        self._queues = [[] for _ in self._levels]
        return found


def delayed(lengths: Sequence[int], batches: Sequence[Sequence[int]], holds: int) -> list[list[int]]:
    """Return the documents of each step; those that still wait after the last step are run in it.

    lengths: of all documents, which `batches` names by their index
    holds:   tokens of a microbatch
    """
    queues = OutlierQueues(holds)
    found = [queues.step(batch, lengths) for batch in batches]
    found[-1] += queues.rest()
    return [step for step in found if step]
