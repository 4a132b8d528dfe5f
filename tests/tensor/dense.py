"""A linear and its gradients on one rank, and the parts of its tensors that ranks of a grid have."""

from typing import NamedTuple

import torch
from torch import Tensor


class Dense(NamedTuple):
    """x [T, k], W [n, k], dy [T, n] and what follows from them."""

    x: Tensor
    weight: Tensor
    dy: Tensor

    @property
    def y(self) -> Tensor:
        return self.x @ self.weight.t()

    @property
    def dx(self) -> Tensor:
        return self.dy @ self.weight

    @property
    def dw(self) -> Tensor:
        return self.dy.t() @ self.x


def dense(tokens: int, inputs: int, outputs: int, dtype: torch.dtype = torch.float64) -> Dense:
    made = torch.Generator().manual_seed(tokens + inputs + outputs)
    shapes = (tokens, inputs), (outputs, inputs), (tokens, outputs)
    return Dense(*(torch.randn(shape, generator=made, dtype=torch.float64).to(dtype) for shape in shapes))


def cut(tensor: Tensor, ranks: int, rank: int, dim: int, blocks: int = 1) -> Tensor:
    """Megatron's part of a rank: of each block of `dim` one of `ranks` equal parts, one below the other."""
    return torch.cat([block.chunk(ranks, dim)[rank] for block in tensor.chunk(blocks, dim)], dim)


def tokens_of(tensor: Tensor, tokens: int, weights: int, column: int) -> Tensor:
    """The tokens that column `column` of a grid gathers: parts j w + column, j from 0, in order."""
    parts = tensor.chunk(tokens * weights)
    return torch.cat([parts[j * weights + column] for j in range(tokens)])


def close(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())
