"""One number per row in place of the output, for ranks that differentiate other ranks' queries.

The gradient of softmax depends on the output only through delta = sum(out * dout) over the head dim. Delta travels
instead of the output; kernels, which take an output, get one with this delta.
"""

from jaxtyping import Float
from torch import Tensor

from megatron_cp.context.merge import accumulator_dtype


def delta(out: Float[Tensor, "s b h d"], dout: Float[Tensor, "s b h d"]) -> Float[Tensor, "s b h"]:
    """Return sum(out * dout) over the head dim, in the accumulator's dtype."""
    dtype = accumulator_dtype(out)
    return (out.to(dtype) * dout.to(dtype)).sum(-1)


def stand_in(delta: Float[Tensor, "s b h"], dout: Float[Tensor, "s b h d"]) -> Float[Tensor, "s b h d"]:
    """Return the shortest rows with this delta, dout * delta / |dout|²; 0 where dout is 0."""
    # rows are scaled to a largest element of 1 so that squares of small gradients do not vanish
    largest = dout.abs().amax(-1, keepdim=True).to(delta.dtype)
    largest = largest.masked_fill(largest == 0, 1.0)
    row = dout.to(delta.dtype) / largest
    square = row.square().sum(-1, keepdim=True)
    factor = delta[..., None] / largest / square.masked_fill(square == 0, 1.0)
    return (row * factor).to(dout.dtype)
