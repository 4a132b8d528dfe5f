"""Compare the times of our backends and of other libraries round by round.

Only times of the same round are compared, so that a drift of the machine's speed has no effect.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from math import comb
from statistics import median

from megatron_cp.bench.comparison import Candidate


@dataclass(frozen=True)
class Ratio:
    """Their seconds over ours, above 1 where ours is faster: the median over rounds and its confidence interval.

    low, high: the interval of 95% confidence; with fewer than six rounds the smallest and the largest ratio
    wins:      rounds in which ours was faster
    """

    median: float
    low: float
    high: float
    wins: int

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One of our backends beside another library's attention on the same layout."""

    ours: str
    theirs: str
    seq: int
    forward: Ratio
    backward: Ratio
    rounds: int


def pairs_of(candidates: Sequence[Candidate], seq: int) -> Iterator[Pair]:
    """Yield each backend of ours with each candidate of another library that divides work over the same layout."""
    ours = [candidate for candidate in candidates if candidate.entry.trusted]
    others = [candidate for candidate in candidates if not candidate.entry.trusted and candidate.entry.layout]
    for mine, other in product(ours, others):
        if mine.entry.layout == other.entry.layout:
            yield _pair(mine, other, seq)


def _pair(mine: Candidate, other: Candidate, seq: int) -> Pair:
    forward, backward = (
        ratio_of([there / here for here, there in zip(*both, strict=True)])
        for both in zip(mine.seconds, other.seconds, strict=True)
    )
    return Pair(
        ours=mine.entry.name,
        theirs=other.entry.name,
        seq=seq,
        forward=forward,
        backward=backward,
        rounds=len(mine.seconds[0]),
    )


def ratio_of(ratios: Sequence[float]) -> Ratio:
    """Return median and interval of the rounds' ratios; the interval is the sign test's, free of distribution."""
    rounds, ordered = len(ratios), sorted(ratios)
    # the largest k with a chance below 1 in 40 that fewer than k of the rounds lie below the true median
    below = accumulate(comb(rounds, k) / 2**rounds for k in range(rounds))
    k = max(1, sum(chance <= 0.025 for chance in below))
    return Ratio(median(ordered), ordered[k - 1], ordered[-k], sum(ratio > 1 for ratio in ratios))
