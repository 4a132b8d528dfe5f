"""The time of a step whose slots hold groups of ranks, and a lower bound of it for every plan."""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from math import ceil
from typing import NamedTuple

from megatron_cp.batches.problem import BatchProblem
from megatron_cp.pipeline.build import build
from megatron_cp.pipeline.costs import uniform
from megatron_cp.pipeline.schedule import Schedule
from megatron_cp.pipeline.simulate import simulate_below
from megatron_cp.pipeline.slices import SliceShare


class GroupLoad(NamedTuple):
    """The ranks of a group, and how many seconds it takes for its documents on a stage."""

    ranks: range
    seconds: float


class GroupSpan(NamedTuple):
    """When a group begins and ends, in seconds."""

    start: float
    end: float


def group_seconds(problem: BatchProblem, degree: int, tokens: int, squares: int) -> float:
    """Return the seconds of a group for its documents; a pad takes what a microbatch of the smallest degree does."""
    if not tokens:
        return problem.rate[problem.degrees[0]].fixed
    return problem.rate[degree].seconds(tokens, squares)


def spans(problem: BatchProblem, slots: Sequence[Sequence[GroupLoad]]) -> list[list[GroupSpan]]:
    """Return when the groups of each slot run on one pipeline stage that never waits for others.

    A group begins when its last rank has ended the slot before; in lockstep, when all ranks of the stage have.
    """
    free = [0.0] * problem.ranks
    found = []
    for slot in slots:
        if problem.lockstep:
            free = [max(free)] * problem.ranks
        row = []
        for ranks, seconds in slot:
            start = max(free[ranks.start : ranks.stop])
            free[ranks.start : ranks.stop] = [start + seconds] * len(ranks)
            row.append(GroupSpan(start, start + seconds))
        found.append(row)
    return found


def step_seconds(problem: BatchProblem, slots: Sequence[Sequence[GroupLoad]]) -> float:
    """Return the seconds of all slots: through the pipeline's schedule where there is one.

    Ranks that share a group in any slot run at the pace of the slowest of them; others do not wait for them.
    """
    if problem.stages == 1:
        return max(span.end for row in spans(problem, slots) for span in row)
    return max(_through_pipeline(problem, times) for times in _paces(problem, slots))


def _paces(problem: BatchProblem, slots: Sequence[Sequence[GroupLoad]]) -> list[tuple[float, ...]]:
    """Return the seconds of each slot for every set of ranks that run apart from all others."""
    # a set is a stretch of ranks, because groups are
    joined = [problem.lockstep] * problem.ranks
    for slot in slots:
        for ranks, _ in slot:
            joined[ranks.start + 1 : ranks.stop] = [True] * (len(ranks) - 1)
    starts = [rank for rank in range(problem.ranks) if rank == 0 or not joined[rank]]
    found: dict[tuple[float, ...], None] = {}
    for start, stop in zip(starts, [*starts[1:], problem.ranks], strict=True):
        times = tuple(max(seconds for ranks, seconds in slot if start <= ranks.start < stop) for slot in slots)
        found[times] = None
    return list(found)


def _through_pipeline(problem: BatchProblem, times: Sequence[float]) -> float:
    """Return the makespan of microbatches that take these times on every stage, a third in each of F, I and W."""
    total = sum(times)
    if total == 0:
        return 0.0
    table = _table(problem.schedule, problem.stages, len(times))
    # the slots are slices of one microbatch that takes them all
    parts = tuple(SliceShare(*(seconds / total,) * 4) for seconds in times)
    run = simulate_below(table, uniform(table.placement, (total / 3, total / 3, total / 3, 0.0), slices=parts))
    assert run
    return run.makespan


@lru_cache(64)
def _table(schedule: str, stages: int, slots: int) -> Schedule:
    return build(schedule, stages, slots)


KERNELS = (1.0, 0.75, 0.5, 0.25, 0.0)
"""Parts of attention's time that are taken from kernels in a bound, the rest from transfers."""


@lru_cache(16)
def lower_bound(problem: BatchProblem) -> float:
    """Return seconds that no plan can go below; time in which a pipeline fills is left out.

    The largest of: the work of all documents at their cheapest degrees, over all ranks, with the fixed time of as many
    slots as memory asks for; the document that takes longest at its best degree; and the documents that need more than
    half of the ranks, whose groups have a rank in common. The longer of kernels and transfers is at least any mean of
    both, which adds up over documents.
    """
    fixed, room = min(rate.fixed for _, rate in problem.rates), problem.ranks * problem.capacity
    slots = least_slots(problem)
    apart = sum(1 for length in problem.lengths if 2 * length > room)
    counts = Counter(problem.lengths)
    bounds = [max(min(problem.alone(length, degree) for degree in _holding(problem, length)) for length in counts)]
    for kernels in KERNELS if any(rate.exchange for _, rate in problem.rates) else KERNELS[:1]:
        work = in_turn = 0.0
        for length, number in counts.items():
            least = [(degree, problem.rate[degree].least(length, kernels)) for degree in _holding(problem, length)]
            work += number * min(degree * seconds for degree, seconds in least)
            if 2 * least[0][0] > problem.ranks:
                in_turn += number * min(seconds for _, seconds in least)
        bounds += [work / problem.ranks + fixed * slots, in_turn + fixed * apart]
    return max(bounds) + problem.after


def _holding(problem: BatchProblem, length: int) -> tuple[int, ...]:
    """Return the degrees whose ranks hold a document."""
    return problem.degrees[problem.degrees.index(problem.floor(length)) :]


def least_slots(problem: BatchProblem) -> int:
    """Return a lower bound of the slots that memory asks for: the bound L2 of bin packing (Martello and Toth, 1990).

    Documents longer than half of a slot need one each; those of at least k tokens fill what these leave, and others.
    """
    room, lengths = problem.ranks * problem.capacity, sorted(problem.lengths)
    before = [0, *accumulate(lengths)]
    half = bisect_right(lengths, room // 2)
    best = max(ceil(problem.tokens / room), len(lengths) - half)
    for least in dict.fromkeys(lengths[:half]):
        # documents beside which none of `least` tokens fits
        alone = bisect_right(lengths, room - least)
        small = before[half] - before[bisect_left(lengths, least)]
        left = (alone - half) * room - (before[alone] - before[half])
        best = max(best, len(lengths) - half + max(0, ceil((small - left) / room)))
    return best
