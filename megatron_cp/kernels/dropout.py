"""Dropout of attention weights by a counter: whether a query drops a key depends on the two tokens alone.

A generator's next numbers would depend on how ranks, tiles and kernel calls cut the scores. Here each query brings the
seed of its row and each key its position, in columns beside those of the product, so that they travel with the tokens
through every algorithm; a kernel that drops weights reads them and multiplies without them. The digits of a number are
small enough for every floating dtype.

Source: the output function of SplitMix64, Steele, Lea and Flood 2014, OOPSLA, as a function of seed and counter.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

COLUMNS = 8
"""Columns of q and k that hold a row's seed or a position."""
DIGIT = 256
"""Whole numbers up to this one are exact in bfloat16."""
STEP = 0x9E3779B97F4A7C15 - 2**64
FIRST, SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
BITS = 24
"""Bits of a drawn number that are compared with the rate."""


def mixed(seed: Tensor | int, counter: Tensor) -> Tensor:
    """Return the numbers of a generator with this seed at these places, 64 random bits in int64."""
    x = seed + (counter + 1) * STEP
    x = (x ^ _shifted(x, 30)) * FIRST
    x = (x ^ _shifted(x, 27)) * SECOND
    return x ^ _shifted(x, 31)


def as_digits(numbers: Int[Tensor, "*n"], dtype: torch.dtype) -> Float[Tensor, "*n 8"]:
    """Return the bytes of int64 numbers, the lowest first."""
    places = torch.arange(0, 8 * COLUMNS, 8, device=numbers.device)
    return ((numbers[..., None] >> places) & (DIGIT - 1)).to(dtype)


def from_digits(digits: Float[Tensor, "*n 8"]) -> Int[Tensor, "*n"]:
    """Return the numbers again."""
    places = torch.arange(0, 8 * COLUMNS, 8, device=digits.device)
    # digits share no bits: the sum wraps at the sign as the number did
    return (digits.long() << places).sum(-1)


def labels(
    q: Float[Tensor, "s b h d"], k: Float[Tensor, "t b g d"]
) -> tuple[Int[Tensor, "s b h"], Int[Tensor, "t b g"]]:
    """Return the seed of each row and the position of each key, which the last columns hold."""
    return from_digits(q[..., -COLUMNS:]), from_digits(k[..., -COLUMNS:])


def threshold(rate: float) -> int:
    """Return the smallest drawn number of a weight that stays."""
    return round(rate * 2**BITS)


def kept(
    q: Float[Tensor, "s b h d"], k: Float[Tensor, "t b g d"], rate: float
) -> tuple[Float[Tensor, "s b h _"], Float[Tensor, "t b g _"], Float[Tensor, "b g r s t"]]:
    """Return q and k without their last columns, and the factor of each weight: 0 or 1 / (1 - rate)."""
    rows, places = labels(q, k)
    # s b (g r) -> b g r s 1, t b g -> b g 1 1 t
    rows = rows.unflatten(2, (k.shape[2], -1)).permute(1, 2, 3, 0)[..., None]
    places = places.permute(1, 2, 0)[:, :, None, None, :]
    drawn = _shifted(mixed(rows, places), 64 - BITS)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    factor = (drawn >= threshold(rate)).to(wide) / (1 - rate)
    return q[..., :-COLUMNS], k[..., :-COLUMNS], factor


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift to the right without the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
