"""Data-Centric Parallel: each bucket of lengths at its own degree and batch size (VideoSys, Zhang and others, 2024).

A profile finds the degree and the number of documents with which a bucket trains most documents per rank and second.
Then groups are made to take like times, by fewer documents or a higher degree; or, where ranks
do not wait for each other in every slot, by the number of microbatches that each group runs one after the other.
"""

from collections.abc import Mapping, Sequence
from itertools import batched
from math import ceil
from statistics import median
from typing import NamedTuple

from megatron_cp.batches.buckets import boundaries, rounded
from megatron_cp.batches.place import place
from megatron_cp.batches.plan import Share, placed
from megatron_cp.batches.problem import BatchProblem

NAME = "dcp"
BUCKETS = 16
MOST_MICROBATCHES = 8
"""Most microbatches that a group runs while others run theirs."""
ABOVE_MEDIAN, ABOVE_TARGET = 1.5, 1.2
"""Weights of a time above the one that is aimed at, against one below it."""


class BucketProfile(NamedTuple):
    """Degree and documents of a microbatch of one bucket, and its seconds with documents of the bucket's boundary."""

    degree: int
    size: int
    seconds: float


class GroupChain(NamedTuple):
    """Microbatches that one group runs in consecutive slots."""

    degree: int
    microbatches: tuple[tuple[int, ...], ...]


def dcp(problem: BatchProblem) -> list[tuple[Share, ...]]:
    """Return the slots of the way that makes the shorter step."""
    upper = boundaries(problem.lengths, BUCKETS)
    of_bucket = rounded(problem.lengths, upper)
    documents = {length: [at for at in problem.longest_first if of_bucket[at] == length] for length in upper}
    profiles = [max(_profiles(problem, length), key=_rate) for length in upper]
    found = [_planned(problem, documents, _near_median(problem, upper, profiles), [1] * len(upper))]
    if not problem.lockstep and problem.stages == 1:
        ranks = sum(
            profile.degree * ceil(len(documents[length]) / profile.size)
            for length, profile in zip(upper, profiles, strict=True)
        )
        # more in turn than the ranks have to run leaves some of them without work
        counts = _accumulation(profiles, min(MOST_MICROBATCHES, ceil(ranks / problem.ranks)))
        found.append(_planned(problem, documents, profiles, counts))
    return min(found, key=lambda slots: placed(NAME, problem, slots).seconds)


def _planned(
    problem: BatchProblem,
    documents: Mapping[int, Sequence[int]],
    profiles: Sequence[BucketProfile],
    counts: Sequence[int],
) -> list[tuple[Share, ...]]:
    """Return the slots of groups that each run so many microbatches of their bucket."""
    chains = [
        GroupChain(profile.degree, chain)
        for each, profile, count in zip(documents.values(), profiles, counts, strict=True)
        for chain in batched(batched(each, profile.size), count)
    ]
    return [slot for members in _rounds(problem, chains) for slot in _slots(members)]


def _rate(profile: BucketProfile) -> float:
    """Return the documents per rank and second."""
    return profile.size / profile.degree / profile.seconds


def _profiles(problem: BatchProblem, length: int) -> list[BucketProfile]:
    """Return what the profile tries and memory holds: the batch is doubled while it fits, else the degree is."""
    holding = [degree for degree in problem.doubling if degree * problem.capacity >= length]
    # a degree beyond a node only where a document needs it
    inside = [degree for degree in holding if degree <= problem.per_node]
    found, size = [], 1
    for degree in inside or holding[:1]:
        while size * length <= degree * problem.capacity:
            found.append(BucketProfile(degree, size, problem.rate[degree].seconds(size * length, size * length**2)))
            size *= 2
    return found


def _near_median(problem: BatchProblem, upper: Sequence[int], profiles: Sequence[BucketProfile]) -> list[BucketProfile]:
    """Return for each bucket the batch size and degree whose time is nearest to the median of all buckets."""
    aim = median(profile.seconds for profile in profiles)

    def off(profile: BucketProfile) -> float:
        over = profile.seconds - aim
        return ABOVE_MEDIAN * over if over > 0 else -over

    found = []
    for length, best in zip(upper, profiles, strict=True):
        degrees = [degree for degree in (best.degree, 2 * best.degree) if degree in problem.rate]
        tried = [
            BucketProfile(degree, size, problem.rate[degree].seconds(size * length, size * length**2))
            for degree in degrees
            for size in range(best.size, 0, -1)
        ]
        found.append(min(tried, key=off))
    return found


def _accumulation(profiles: Sequence[BucketProfile], most: int) -> list[int]:
    """Return the number of microbatches, at most `most`, of each bucket's groups that comes nearest to one time."""

    def off(seconds: float, aim: float) -> float:
        return ABOVE_TARGET * (seconds - aim) if seconds > aim else aim - seconds

    best: tuple[float, list[int]] | None = None
    for aim in sorted({profile.seconds * count for profile in profiles for count in range(1, most + 1)}):
        counts = [min(range(1, most + 1), key=lambda count: off(profile.seconds * count, aim)) for profile in profiles]
        # a longer aim has room for larger differences
        total = sum(off(profile.seconds * count, aim) for profile, count in zip(profiles, counts, strict=True)) / aim
        if best is None or total < best[0]:
            best = total, counts
    assert best
    return best[1]


def _rounds(problem: BatchProblem, chains: Sequence[GroupChain]) -> list[list[GroupChain]]:
    """Return chains that run side by side: in each round as many as the ranks hold, those of most slots first."""
    waiting = sorted(chains, key=lambda chain: (-len(chain.microbatches), -chain.degree))
    found: list[list[GroupChain]] = []
    while waiting:
        members: list[GroupChain] = []
        left = []
        free = problem.ranks
        for chain in waiting:
            degrees = [member.degree for member in members] + [chain.degree]
            has_place = problem.aligned or place(degrees, problem.ranks, problem.per_node) is not None
            if chain.degree <= free and has_place:
                members.append(chain)
                free -= chain.degree
            else:
                left.append(chain)
        found.append(members)
        waiting = left
    return found


def _slots(members: Sequence[GroupChain]) -> list[tuple[Share, ...]]:
    """Return the slots of a round; a chain that has ended keeps its place."""
    return [
        tuple(
            Share(chain.degree, chain.microbatches[slot] if slot < len(chain.microbatches) else ()) for chain in members
        )
        for slot in range(max(len(chain.microbatches) for chain in members))
    ]
