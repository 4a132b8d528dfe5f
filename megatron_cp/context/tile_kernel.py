"""One tile through a kernel that knows full and causal masks, or windows too."""

from torch import Tensor

from megatron_cp.context.masks import Mask
from megatron_cp.context.tiles import Shape
from megatron_cp.kernels import Kernel, takes_windows


def tile_forward(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, *, scale: float, shape: Shape
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of one tile."""
    if isinstance(shape, Mask):
        assert takes_windows(kernel), f"kernel {kernel.name!r} has no window argument"
        return kernel.forward(q, k, v, scale=scale, causal=False, window=shape)
    if shape != "upper":
        return kernel.forward(q, k, v, scale=scale, causal=shape == "lower")
    # from the i-th key on, read backwards, is up to the i-th key
    q, k, v = (x.flip(0) for x in (q, k, v))
    out, lse = kernel.forward(q, k, v, scale=scale, causal=True)
    return out.flip(0), lse.flip(0)


def tile_backward(
    kernel: Kernel,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    shape: Shape,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv) of one tile; out and lse are of the whole softmax."""
    if isinstance(shape, Mask):
        assert takes_windows(kernel), f"kernel {kernel.name!r} has no window argument"
        return kernel.backward(dout, q, k, v, out, lse, scale=scale, causal=False, window=shape)
    if shape != "upper":
        return kernel.backward(dout, q, k, v, out, lse, scale=scale, causal=shape == "lower")
    dout, q, k, v, out, lse = (x.flip(0) for x in (dout, q, k, v, out, lse))
    dq, dk, dv = kernel.backward(dout, q, k, v, out, lse, scale=scale, causal=True)
    return dq.flip(0), dk.flip(0), dv.flip(0)
