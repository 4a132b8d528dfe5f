"""Weights cut as in Megatron's one-dimensional layout: gathered over the neighbours of a grid, gradients cut again."""

from typing import NamedTuple

from torch import Tensor

from megatron_cp.tensor.engine import Engine


class WeightCut(NamedTuple):
    """How a weight [n, k] is cut over tensor-parallel ranks.

    dim:    0 for a column-parallel linear, 1 for a row-parallel one
    blocks: parts of the output that are each cut; 2 for gate and values of a gated linear, one below the other
    """

    dim: int
    blocks: int = 1


def gather_weight(shard: Tensor, cut: WeightCut, weights: Engine) -> Tensor:
    """Return the weight that the ranks of a fabric hold together: shard [n/w, k] -> [n, k], or [n, k/w] -> [n, k]."""
    if weights.fabric.size == 1:
        return shard
    shards = weights.fabric.all_gather(shard)
    if cut.dim == 1:
        # w n k -> n (w k)
        return shards.transpose(0, 1).flatten(1)
    # w (blocks n) k -> (blocks w n) k
    return shards.unflatten(1, (cut.blocks, -1)).transpose(0, 1).flatten(0, 2)


def scatter_gradient(gradient: Tensor, cut: WeightCut, weights: Engine) -> Tensor:
    """Add the gradient of a gathered weight over the ranks, and return the part of this rank's shard."""
    size = weights.fabric.size
    if size == 1:
        return gradient
    if cut.dim == 1:
        # n (w k) -> w n k
        parts = gradient.unflatten(1, (size, -1)).transpose(0, 1)
    else:
        # (blocks w n) k -> w (blocks n) k
        parts = gradient.unflatten(0, (cut.blocks, size, -1)).transpose(0, 1).flatten(1, 2)
    return weights.reduce_scatter(parts.contiguous())
