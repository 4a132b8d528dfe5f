"""The arguments of a loop, and the tensors that it keeps for the backward pass."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from megatron_cp.comm import Fabric
from megatron_cp.context import cache_sizes
from megatron_cp.context.layouts import Layout, Runs, cut, length
from megatron_cp.context.masks import AnyMask
from megatron_cp.context.merge import SoftmaxMerge, Sum
from megatron_cp.context.remembered import remembered
from megatron_cp.context.tile_kernel import tile_backward, tile_forward
from megatron_cp.context.tiles import Tile, tiles
from megatron_cp.grid import Grid
from megatron_cp.kernels import Kernel, takes_windows


class Saved(NamedTuple):
    """Tensors of the forward pass that the backward pass needs, in the layout of the innermost loop."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor


class Block(NamedTuple):
    """Keys and values with the tokens of rank `owner`, from its local token `first` on.

    runs: positions from the owner's first token on, if they are not the owner's own (a gathered sequence)
    """

    owner: int
    first: int
    k: Tensor
    v: Tensor
    runs: Runs | None = None

    def part(self, tokens: slice) -> list[Tensor]:
        """Return k and v of these of the owner's tokens."""
        here = slice(tokens.start - self.first, tokens.stop - self.first) if tokens.start < tokens.stop else slice(0, 0)
        return [_at(here, self.k), _at(here, self.v)]


class Queries(NamedTuple):
    """Some of rank `owner`'s queries: its local tokens `rows`, in tensors that hold its tokens from `first` on."""

    owner: int
    rows: slice
    first: int = 0


class Axes(NamedTuple):
    """The context-parallel group as a grid: one axis exchanges heads for tokens, the other is a ring."""

    grid: Grid
    inner: Fabric
    outer: Fabric
    heads: str

    @property
    def ring(self) -> str:
        return "outer" if self.heads == "inner" else "inner"

    def fabric(self, axis: str) -> Fabric:
        return self.inner if axis == "inner" else self.outer


@dataclass(frozen=True, kw_only=True)
class Task:
    """One attention over tokens sharded on the ranks of a fabric.

    layout: positions of each rank's tokens, in sequence order on each rank
    scale:  factor of the scores
    heads:  query and KV heads on each rank, before any exchange
    axes:   the same ranks as a grid, for backends that use two axes
    chunks: number of chunks over time for `fpdt`; None for as many as make a chunk of the paper's size
    sink:   logits [h] or [b h] of sinks in the accumulator's dtype, for loops that merge them themselves
    """

    fabric: Fabric
    layout: Layout
    mask: AnyMask
    scale: float
    kernel: Kernel
    heads: tuple[int, int]
    axes: Axes | None = None
    chunks: int | None = None
    sink: Tensor | None = None

    @property
    def mine(self) -> Runs:
        """Positions of this rank's tokens."""
        return self.layout[self.fabric.rank]

    def on(self, fabric: Fabric, layout: Layout, kernel: Kernel) -> "Task":
        """Return this attention over other ranks, positions and heads."""
        return replace(self, fabric=fabric, layout=layout, kernel=kernel)

    @cached_property
    def my_queries(self) -> Queries:
        """All queries of this rank."""
        return Queries(self.fabric.rank, slice(0, length(self.mine)))

    def attend(self, merge: SoftmaxMerge, q: Tensor, block: Block, queries: Queries | None = None) -> None:
        """Merge attention of `queries`, by default all of this rank's, over a block of keys."""
        for rows, cols, shape in self.tiles(block, queries or self.my_queries):
            inputs = _at(rows, q), _at(cols, block.k), _at(cols, block.v)
            merge.add(rows, *tile_forward(self.kernel, *inputs, scale=self.scale, shape=shape))

    def attend_backward(
        self, dq: Sum, dk: Sum, dv: Sum, dout: Tensor, saved: Saved, block: Block, queries: Queries | None = None
    ) -> None:
        """Add the part of `queries`, by default all of this rank's, of the gradients of q and of a block of keys."""
        q, out, lse = saved.q, saved.out, saved.lse
        for rows, cols, shape in self.tiles(block, queries or self.my_queries):
            k, v = _at(cols, block.k), _at(cols, block.v)
            inputs = (_at(rows, dout), _at(rows, q), k, v, _at(rows, out), _at(rows, lse))
            parts = tile_backward(self.kernel, *inputs, scale=self.scale, shape=shape)
            for total, where, part in zip((dq, dk, dv), (rows, cols, cols), parts, strict=True):
                total.add(where, part)

    def tiles(self, block: Block, queries: Queries) -> tuple[Tile, ...]:
        """Return the kernel calls of queries with a block, as tokens of the tensors that hold them."""
        return _held(
            self.layout[queries.owner],
            queries.rows,
            queries.first,
            self.layout[block.owner] if block.runs is None else block.runs,
            block.first,
            self.mask,
            takes_windows(self.kernel),
        )


def _at(tokens: slice, x: Tensor) -> Tensor:
    """Return these tokens of x: itself where they are all, since slicing takes torch a while."""
    return x if (tokens.start, tokens.stop) == (0, x.shape[0]) else x[tokens]


@remembered(cache_sizes.PAIRS)
def _held(
    q_runs: Runs, rows: slice, first_query: int, kv_runs: Runs, first_key: int, mask: AnyMask, windows: bool
) -> tuple[Tile, ...]:
    """Return the tiles of these rows with the keys, as tokens of tensors that start at the first query and key."""
    before = rows.start - first_query
    return tuple(
        Tile(
            slice(q.start + before, q.stop + before),
            slice(kv.start - first_key, kv.stop - first_key),
            shape,
        )
        for q, kv, shape in tiles(cut(q_runs, rows), kv_runs, mask, windows=windows)
    )
