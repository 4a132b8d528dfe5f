"""ALiBi: scores fall with the distance of a key, by columns of queries and keys whose product is that bias.

Columns travel with the tokens through every algorithm, and kernels multiply them as they do head dims. k has the two
digits of its position p and three times 256; q has the slope m for the digits, and three parts whose sum is -m p / 256,
which no 16-bit dtype holds as one number.

Source: Press, Smith and Lewis 2022, arXiv:2108.12409, section 3.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from megatron_cp.context.layouts import Runs
from megatron_cp.errors import Refused
from megatron_cp.kernels.dropout import DIGIT

COLUMNS = 8
"""Columns that q and k get, of which five are used: kernels and copies align to eight."""


def alibi_slopes(heads: int) -> list[float]:
    """Return the slope of each query head of a model: for a power of two from 2^(-8 / heads) down to 2^-8.

    Other numbers of heads take the slopes of the next lower power of two and then every other one of the next higher,
    as the authors' code does. A tensor-parallel rank has its heads' part. Raises ValueError below one head.
    """
    if heads < 1:
        raise Refused(f"ALiBi gives a slope to each of 1 or more query heads, got {heads}")
    lower = 1 << (heads.bit_length() - 1)
    first = [2.0 ** (-8 * (head + 1) / lower) for head in range(lower)]
    return first + [2.0 ** (-4 * (head + 1) / lower) for head in range(0, 2 * (heads - lower), 2)]


def as_slopes(slopes: object) -> tuple[float, ...] | None:
    """Return the slopes of a plan; raises ValueError for anything but finite numbers of 0 or more."""
    if slopes is None:
        return None
    given = slopes.tolist() if isinstance(slopes, Tensor) else slopes
    if isinstance(given, Sequence) and given and all(map(_is_slope, given)):
        return tuple(map(float, given))
    raise Refused(
        f"alibi is a finite slope of 0 or more for each query head, as alibi_slopes makes them, got {slopes!r}"
    )


def check_alibi(slopes: Sequence[float], q: Tensor) -> None:
    """Raise Refused for queries of another number of heads."""
    if q.shape[2] != len(slopes):
        raise Refused(f"alibi has slopes of {len(slopes)} query heads, got q of {q.shape[2]}; give those of q's heads")


def with_positions(
    q: Float[Tensor, "s b h d"], k: Float[Tensor, "s b g d"], mine: Runs, slopes: Sequence[float], scale: float
) -> tuple[Float[Tensor, "s b h _"], Float[Tensor, "s b g _"]]:
    """Return q and k with columns whose product, times the scale, is slope * (position of k - position of q)."""
    places = torch.cat([torch.arange(run.start, run.stop, run.step) for run in mine]).to(q.device, non_blocking=True)
    of_k = torch.stack([places // DIGIT, places % DIGIT, *[torch.full_like(places, DIGIT)] * 3], -1)
    # the slope as q holds it, so that both of its products are of one number
    slope = (torch.tensor(slopes, dtype=torch.float64) / scale).to(q.device, q.dtype).double()
    rest = -slope * places[:, None] / DIGIT
    parts = []
    for _ in range(3):
        parts.append(rest.to(q.dtype))
        rest = rest - parts[-1]
    of_q = torch.stack([*(x.expand_as(rest).to(q.dtype) for x in (slope * DIGIT, slope)), *parts], -1)
    return _beside(q, of_q[:, None]), _beside(k, of_k[:, None, None])


def _beside(x: Tensor, columns: Tensor) -> Tensor:
    wide = torch.nn.functional.pad(columns.to(x.dtype), (0, COLUMNS - columns.shape[-1]))
    return torch.cat([x, wide.expand(*x.shape[:3], COLUMNS)], -1)


def _is_slope(number: object) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and 0 <= number < math.inf
