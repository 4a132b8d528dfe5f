"""Lengths of documents without a corpus, and the streams of equal length that Megatron cuts from documents."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.random import Generator
    from numpy.typing import NDArray

type Drawn = "NDArray[np.float64]"

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


def sft(numbers: "Generator", count: int) -> Drawn:
    """Instructions: 99.89% average 1,000 tokens, the others 37,000 (SFT mix of Llama 3, by arXiv:2503.02356)."""
    is_long, long = numbers.random(count) < 0.0011, numbers.lognormal(np.log(34_000), 0.4, count)
    return np.where(is_long, long, numbers.lognormal(np.log(700), 0.84, count))


def web(numbers: "Generator", count: int) -> Drawn:
    """Web pages: lognormal with a median of 700 tokens, without a tail."""
    return numbers.lognormal(np.log(700), 1.15, count)


def code(numbers: "Generator", count: int) -> Drawn:
    """Source files: lognormal with a median of 1,000 tokens, and 8% from a Pareto tail above 8,192."""
    is_long, long = numbers.random(count) < 0.08, 8192 * (1 + numbers.pareto(1.0, count))
    return np.where(is_long, long, numbers.lognormal(np.log(1000), 1.3, count))


def books(numbers: "Generator", count: int) -> Drawn:
    """Long documents, from 8,192 tokens: by the tokens in each doubling of the length that Olmo 3's pool is made of."""
    tokens = np.array([144, 118, 138.87, 96, 60.8, 35.1, 21.5, 26.9])
    shortest = 8192 * 2.0 ** np.arange(len(tokens))
    share = tokens / shortest
    return shortest[numbers.choice(len(tokens), count, p=share / share.sum())] * 2 ** numbers.random(count)


MIXES: "dict[str, Callable[[Generator, int], Drawn]]" = {"sft": sft, "web": web, "code": code, "books": books}
"""Lengths of documents after published figures: each draws so many."""
SHORTEST = 16
"""Tokens of the shortest document of a mix."""


def drawn(mix: str, count: int, longest: int, seed: int = 1) -> list[int]:
    """Draw the tokens of `count` documents of a mix; longer ones than `longest` are cut."""
    return np.clip(MIXES[mix](np.random.default_rng(seed), count), SHORTEST, longest).astype(int).tolist()


def streams(lengths: Sequence[int], tokens: int, count: int) -> list[list[int]]:
    """Return where documents end in `count` streams of `tokens` tokens, spread over all that the documents fill.

    Documents follow each other without a gap, and are cut where a stream ends. Fewer are returned where there are not
    so many.
    """
    ends = np.array([*accumulate(lengths)])
    starts = range(0, int(ends[-1]) - tokens + 1, tokens)
    chosen = starts[:: max(1, len(starts) // count)][:count]
    return [[0, *(ends[(ends > start) & (ends < start + tokens)] - start).tolist(), tokens] for start in chosen]
