"""Lengths of documents without a corpus, and the streams of equal length that Megatron cuts from documents."""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

TAIL = 0.03
"""Share of documents in the tail of `long_tail`."""


def long_tail(count: int, longest: int, seed: int = 0) -> list[int]:
    """Draw the tokens of `count` documents of at most `longest`: most are short, most tokens are in the long ones.

    The body is lognormal with a median of 600 tokens; 3% of the documents are from a Pareto tail above 8,000.
    """
    numbers = np.random.default_rng(seed)
    body = numbers.lognormal(np.log(600), 1.1, count)
    tail = 8000 * (1 + numbers.pareto(1.05, count))
    lengths = np.where(numbers.random(count) < TAIL, tail, body)
    return np.clip(lengths, 1, longest).astype(int).tolist()


def streams(lengths: Sequence[int], tokens: int, count: int) -> list[list[int]]:
    """Return where documents end in `count` streams of `tokens` tokens, spread over all that the documents fill.

    Documents follow each other without a gap, and are cut where a stream ends. Fewer are returned where there are not
    so many.
    """
    ends = np.array([*accumulate(lengths)])
    starts = range(0, int(ends[-1]) - tokens + 1, tokens)
    chosen = starts[:: max(1, len(starts) // count)][:count]
    return [[0, *(ends[(ends > start) & (ends < start + tokens)] - start).tolist(), tokens] for start in chosen]
