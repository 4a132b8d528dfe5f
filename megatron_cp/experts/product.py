"""Form of a linear over all experts of a rank: forward, and a backward whose two halves can run apart.

Rows are tokens, those of one expert after those of the one before (MegaBlocks, arXiv:2211.15841, section 3: no expert
has a capacity, none of its tokens is dropped or padded).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Groups(NamedTuple):
    """Number of rows of each expert; some may be 0.

    sizes: on the host
    ends:  rows before the end of each expert, int32, on the device of the rows
    """

    sizes: tuple[int, ...]
    ends: Tensor

    @property
    def filled(self) -> Iterator[tuple[int, slice]]:
        """Experts that have rows, and their rows."""
        first = 0
        for expert, size in enumerate(self.sizes):
            if size:
                yield expert, slice(first, first + size)
            first += size


def groups_of(sizes: Tensor | Sequence[int], device: torch.device) -> Groups:
    """Return the groups of so many rows each; sizes on a GPU are waited for, as in Megatron's own experts."""
    counts = sizes if isinstance(sizes, Tensor) else torch.tensor(sizes, dtype=torch.int64)
    return Groups(tuple(counts.tolist()), counts.cumsum(0).to(device, torch.int32))


class GroupedProduct(Protocol):
    """y = x W^T with the weight of each row's expert. x: [T, k], weights: E of [n, k], y: [T, n], T over all experts.

    calls: linears computed forward, for tests and reports
    """

    name: str
    calls: int

    def forward(self, x: Tensor, weights: Sequence[Tensor], groups: Groups) -> Tensor:
        """Return y."""
        ...

    def input_gradient(self, dy: Tensor, weights: Sequence[Tensor], groups: Groups) -> Tensor:
        """Return dx [T, k] from dy [T, n]."""
        ...

    def weight_gradients(self, dy: Tensor, x: Tensor, groups: Groups) -> Sequence[Tensor]:
        """Return the gradient [n, k] of each weight; zeros for an expert without rows."""
        ...
