"""Weights of experts that several ranks share are gathered, tokens stay, and gradients are scattered to the shards.

Parameters, optimizer and checkpoints are those of expert tensor parallelism, so that a layer can gather tokens in one
step and weights in the next (Tutel, arXiv:2206.03382, section 3.2). All shards of a layer travel in one message.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_cp.comm import Fabric

Keep = Callable[[Sequence[Tensor], Sequence[Tensor]], None]
"""Adds gradients to the gradients of parameters."""


class ShardCut(NamedTuple):
    """How ranks share a weight.

    dim:   that is cut
    parts: of it that are cut each for itself, such as gates and values
    """

    dim: int
    parts: int = 1

    def whole_shape(self, shard: torch.Size, ranks: int) -> torch.Size:
        """Return the shape of the weight that ranks have such a shard of."""
        return torch.Size([size * ranks if at == self.dim else size for at, size in enumerate(shard)])

    def joined(self, shards: Tensor, shape: torch.Size) -> Tensor:
        """Return the weight, flat, from the shards [p, n], of a shape each."""
        outer = self.parts * shape[: self.dim].numel()
        return shards.view(len(shards), outer, -1).transpose(0, 1).reshape(-1)

    def cut(self, whole: Tensor, ranks: int, shape: torch.Size) -> Tensor:
        """Return the shards [p, n] of a flat weight."""
        outer = self.parts * shape[: self.dim].numel()
        return whole.view(outer, ranks, -1).transpose(0, 1).reshape(ranks, -1)


class GatheredWeights:
    """Weights of one layer on their way.

    cuts:        of each parameter
    shapes:      of this rank's shards
    there, home: times that this rank has gathered weights, and scattered gradients
    bytes:       that it has sent
    """

    def __init__(self, fabric: Fabric, cuts: Sequence[ShardCut], shapes: Sequence[torch.Size]) -> None:
        self.fabric, self.cuts, self.shapes = fabric, tuple(cuts), tuple(shapes)
        self.there = self.home = self.bytes = 0

    def gather(self, shards: Sequence[Tensor]) -> Tensor:
        """Return all weights in one row, from this rank's shards."""
        before = self.fabric.sent
        with torch.no_grad():
            rows = self.fabric.all_gather(torch.cat([shard.detach().reshape(-1) for shard in shards]))
            parts = rows.split([shape.numel() for shape in self.shapes], 1)
            found = torch.cat([cut.joined(part, shape) for cut, part, shape in self._each(parts)])
        self.there += 1
        self.bytes += self.fabric.sent - before
        return found

    def scatter(self, gradient: Tensor) -> list[Tensor]:
        """Return the gradients of this rank's shards, summed over the ranks, from a row of all weights' gradients."""
        before, ranks = self.fabric.sent, self.fabric.size
        parts = gradient.split([ranks * shape.numel() for shape in self.shapes])
        rows = torch.cat([cut.cut(part.contiguous(), ranks, shape) for cut, part, shape in self._each(parts)], 1)
        mine = self.fabric.reduce_scatter(rows).split([shape.numel() for shape in self.shapes])
        self.home += 1
        self.bytes += self.fabric.sent - before
        return [each.view(shape) for each, shape in zip(mine, self.shapes, strict=True)]

    def weights(self, row: Tensor) -> list[Tensor]:
        """Return the weights that are in a row, views of it."""
        ranks = self.fabric.size
        parts = row.split([ranks * shape.numel() for shape in self.shapes])
        return [part.view(cut.whole_shape(shape, ranks)) for cut, part, shape in self._each(parts)]

    def _each(self, parts: Sequence[Tensor]) -> Any:
        return zip(self.cuts, parts, self.shapes, strict=True)


class _Gathered(torch.autograd.Function):
    """Rows of tokens and a row of weights as they are; in backward the gradients of the weights go to their shards.

    Every rank has rows of tokens, be they none at all, so that every rank takes part.
    """

    @staticmethod
    def forward(
        ctx: Any, gathered: GatheredWeights, keep: Any, shards: Any, tokens: Tensor, row: Tensor, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.gathered, ctx.keep, ctx.shards = gathered, keep, shards
        return tokens.view_as(tokens), row.view_as(row)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, tokens: Tensor, row: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.gathered.scatter(row)
        if ctx.keep is None:
            return None, None, None, tokens, None, *found
        ctx.keep(ctx.shards, found)
        return None, None, None, tokens, None


def gathered_here(
    gathered: GatheredWeights, shards: Sequence[Tensor], tokens: Tensor, row: Tensor, keep: Keep | None = None
) -> tuple[Tensor, Tensor]:
    """Return tokens and a row of all weights, whose gradients go to the shards in backward.

    row:  of `gather`
    keep: takes the gradients of the shards; None where autograd does
    """
    if not torch.is_grad_enabled():
        return tokens, row
    if not tokens.requires_grad:
        # a rank whose gradients are kept would have no backward
        tokens = tokens.detach().requires_grad_()
    result: tuple[Tensor, Tensor] = _Gathered.apply(gathered, keep, shards, tokens, row, *([] if keep else shards))
    return result
