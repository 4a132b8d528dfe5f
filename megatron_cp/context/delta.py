"""What a rank needs of the output to differentiate other ranks' queries: one number per row.

Softmax's gradient takes the output only through delta = sum(out * dout) over the head dim. It travels instead of the
output; kernels ask for an output all the same and are given one with the same delta.
"""

from jaxtyping import Float
from torch import Tensor

from megatron_cp.context.merge import accumulator_dtype


def delta(out: Float[Tensor, "s b h d"], dout: Float[Tensor, "s b h d"]) -> Float[Tensor, "s b h"]:
    """sum(out * dout) over the head dim, in the accumulator's dtype."""
    dtype = accumulator_dtype(out)
    return (out.to(dtype) * dout.to(dtype)).sum(-1)


def stand_in(delta: Float[Tensor, "s b h"], dout: Float[Tensor, "s b h d"]) -> Float[Tensor, "s b h d"]:
    """The shortest rows with this delta, dout * delta / |dout|²: never longer than the true ones; 0 where dout is 0."""
    # rows are scaled to a largest element of 1 so that squares of small gradients do not vanish
    largest = dout.abs().amax(-1, keepdim=True).to(delta.dtype)
    largest = largest.masked_fill(largest == 0, 1.0)
    row = dout.to(delta.dtype) / largest
    square = row.square().sum(-1, keepdim=True)
    factor = delta[..., None] / largest / square.masked_fill(square == 0, 1.0)
    return (row * factor).to(dout.dtype)
