"""Tensors of the same tokens in one message, whatever their heads and head dims."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def packed(*tensors: Float[Tensor, "s b _ _"]) -> Float[Tensor, "s b _ _"]:
    """Return one tensor with the elements of all: heads behind heads, or flat rows where head dims differ."""
    if len({x.shape[3] for x in tensors}) == 1:
        return torch.cat(tensors, 2)
    # s b h d -> s b 1 (h d)
    return torch.cat([x.flatten(2) for x in tensors], 2).unsqueeze(2)


def unpacked(whole: Float[Tensor, "s b _ _"], shapes: Sequence[tuple[int, int]]) -> list[Float[Tensor, "s b _ _"]]:
    """Return views of a packed tensor by heads and head dim of each part."""
    if len({dim for _, dim in shapes}) == 1:
        return list(whole.split([heads for heads, _ in shapes], dim=2))
    parts = whole.squeeze(2).split([heads * dim for heads, dim in shapes], dim=2)
    return [part.unflatten(2, shape) for part, shape in zip(parts, shapes, strict=True)]


def heads_of(*tensors: Tensor) -> list[tuple[int, int]]:
    """Return heads and head dim of each of these tensors, by which `unpacked` finds them again."""
    return [(x.shape[2], x.shape[3]) for x in tensors]


def with_dim(x: Float[Tensor, "s b h d"], dim: int) -> Float[Tensor, "s b h _"]:
    """Return a tensor shaped like x but for its head dim, to read shape, dtype and device from."""
    return x if x.shape[3] == dim else x.new_empty(1).expand(*x.shape[:3], dim)
