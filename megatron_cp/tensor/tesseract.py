"""Tesseract (arXiv:2105.14500), 2.5D tensor parallelism: a grid of q x q ranks, d layers deep.

In each layer of the depth a linear is the two-dimensional one; tokens are split over the depth, weights repeated, and
their gradients added over it. Megatron has two axes that do exactly this, once per step and behind the backward instead
of in each linear: context parallelism and data parallelism. So 2.5D is `summa_2d` beside one of them, and this file
decides which one it is called after.
"""

from typing import NamedTuple

from megatron_cp.errors import Refused


class Depth(NamedTuple):
    """The axis over which tokens are split and weights repeated."""

    axis: str
    size: int


def depth(context: int, data: int) -> Depth:
    """Return the depth of a run: its context-parallel axis, or else its data-parallel one.

    Raises ValueError where both are of size 1.
    """
    if context > 1:
        return Depth("context parallel", context)
    if data > 1:
        return Depth("data parallel", data)
    raise Refused(
        "--tp-comm-type 2.5d takes its depth from context or data parallelism, got 1 of both; add "
        "--context-parallel-size, start more processes, or use 2d"
    )
