"""Groups of one degree in each slot, the best for its documents: the baseline beside one degree for all."""

from collections.abc import Sequence

from megatron_cp.batches.assign import Split, homogeneous_splits
from megatron_cp.batches.blast import consecutive, dealt, possible
from megatron_cp.batches.plan import Share, placed
from megatron_cp.batches.problem import BatchProblem

NAME = "homogeneous"


def homogeneous(problem: BatchProblem) -> list[tuple[Share, ...]]:
    """Return slots whose groups are of equal degree: of slots by length and of dealt slots the faster."""
    work = [length * problem.rate[problem.floor(length)].token for length in problem.lengths]
    found = [
        *possible(problem, lambda count: _slots(problem, consecutive(problem, count))),
        *possible(problem, lambda count: _slots(problem, dealt(problem, count, work))),
    ]
    return min(found, key=lambda slots: placed(NAME, problem, slots).seconds)


def _slots(problem: BatchProblem, divided: Sequence[Sequence[int]] | None) -> list[tuple[Share, ...]] | None:
    """Return the best split of each slot; None where a slot has none."""
    if divided is None:
        return None
    best: list[Split] = []
    for documents in divided:
        splits = homogeneous_splits(problem, documents, problem.doubling, problem.lengths)
        if not splits:
            return None
        best.append(min(splits, key=lambda split: split.seconds))
    return [split.shares for split in best]
