"""One number per row in place of the output, for ranks that differentiate other ranks' queries.

The gradient of softmax depends on the output only through delta = sum(out * dout) over the head dim. Delta travels
instead of the output; kernels, which take an output, get one with this delta.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from megatron_cp.context.merge import accumulator_dtype

SHARES = 1 / 8, 1 / 64
"""Sizes of the elements that are corrected, over the row's largest; smaller ones are rounded less, but change more."""


def delta(out: Float[Tensor, "s b h d"], dout: Float[Tensor, "s b h d"]) -> Float[Tensor, "s b h"]:
    """Return sum(out * dout) over the head dim, in the accumulator's dtype."""
    dtype = accumulator_dtype(out)
    return (out.to(dtype) * dout.to(dtype)).sum(-1)


def stand_in(delta: Float[Tensor, "s b h"], dout: Float[Tensor, "s b h d"]) -> Float[Tensor, "s b h d"]:
    """Return the shortest rows with this delta, dout * delta / |dout|²; 0 where dout is 0.

    In low precision two elements of each row make up for what rounding changes in its delta.
    """
    # rows are scaled to a largest element of 1 so that squares of small gradients do not vanish
    largest = dout.abs().amax(-1, keepdim=True).to(delta.dtype)
    largest = largest.masked_fill(largest == 0, 1.0)
    row = dout.to(delta.dtype) / largest
    square = row.square().sum(-1, keepdim=True)
    factor = delta[..., None] / largest / square.masked_fill(square == 0, 1.0)
    rounded = (row * factor).to(dout.dtype)
    return rounded if rounded.dtype == delta.dtype else _corrected(rounded, row, delta, dout)


def _corrected(rounded: Tensor, row: Tensor, delta: Tensor, dout: Tensor) -> Tensor:
    """Change two elements of each rounded row so that its delta is right; `row` is dout over its largest element."""
    dtype, missing = delta.dtype, delta - (rounded.to(delta.dtype) * dout.to(delta.dtype)).sum(-1)
    missing = missing[..., None]
    for share in SHARES:
        at = (row.abs() - share).abs_().masked_fill_(row == 0, torch.inf).argmin(-1, keepdim=True)
        weight, before = dout.gather(-1, at).to(dtype), rounded.gather(-1, at)
        after = (before + missing / weight.masked_fill(weight == 0, 1.0)).to(rounded.dtype)
        rounded = rounded.scatter(-1, at, after)
        missing = missing - (after.to(dtype) - before.to(dtype)) * weight
    return rounded
