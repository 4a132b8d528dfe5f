"""Other libraries beside ours in the same rounds: who was faster how often, and by how much.

Times of one round are compared with each other, so that a machine whose speed drifts does not decide.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from math import comb
from statistics import median

from megatron_cp.bench.comparison import Candidate


@dataclass(frozen=True)
class Ratio:
    """Their seconds over ours, above 1 where ours is faster: the median over rounds, and between which it lies.

    low, high: the median's interval of 95% confidence; fewer than six rounds give less, from the least to the largest
    wins:      rounds in which ours was faster
    """

    median: float
    low: float
    high: float
    wins: int

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Pair:
    """Ours beside another library's on the same layout."""

    ours: str
    theirs: str
    seq: int
    forward: Ratio
    backward: Ratio
    rounds: int


def pairs_of(candidates: Sequence[Candidate], seq: int) -> Iterator[Pair]:
    """Each backend of ours with each other library's candidate that has the same layout and divides the work too."""
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
    return Pair(mine.entry.name, other.entry.name, seq, forward, backward, len(mine.seconds[0]))


def ratio_of(ratios: Sequence[float]) -> Ratio:
    """What rounds say; the interval is the sign test's, which asks nothing of how they are spread."""
    rounds, ordered = len(ratios), sorted(ratios)
    # of so many rounds fewer than k are below the median in less than one case of 40
    below = accumulate(comb(rounds, k) / 2**rounds for k in range(rounds))
    k = max(1, sum(chance <= 0.025 for chance in below))
    return Ratio(median(ordered), ordered[k - 1], ordered[-k], sum(ratio > 1 for ratio in ratios))
