"""Other libraries beside ours in the same rounds: who was faster how often, and by how much.

Times of one round are compared with each other, so that a machine whose speed drifts does not decide.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median

from megatron_cp.bench.contest import Contender


@dataclass(frozen=True)
class Pair:
    """Ours beside another library's on the same layout.

    forward, backward: median over rounds of their seconds over ours, above 1 where ours is faster
    wins:              rounds in which ours was faster, forward and backward
    """

    ours: str
    theirs: str
    seq: int
    forward: float
    backward: float
    wins: tuple[int, int]
    rounds: int


def pairs_of(contenders: Sequence[Contender], seq: int) -> Iterator[Pair]:
    """Each backend of ours with each other library's contender that has the same layout and divides the work too."""
    ours = [contender for contender in contenders if contender.entry.trusted]
    others = [contender for contender in contenders if not contender.entry.trusted and contender.entry.layout]
    for mine, other in product(ours, others):
        if mine.entry.layout == other.entry.layout:
            yield _pair(mine, other, seq)


def _pair(mine: Contender, other: Contender, seq: int) -> Pair:
    forward, backward = (
        [there / here for here, there in zip(*both, strict=True)]
        for both in zip(mine.seconds, other.seconds, strict=True)
    )
    wins = sum(ratio > 1 for ratio in forward), sum(ratio > 1 for ratio in backward)
    return Pair(mine.entry.name, other.entry.name, seq, median(forward), median(backward), wins, len(forward))
