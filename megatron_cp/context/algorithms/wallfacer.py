"""WallFacer's tile: every rank attends the queries of its row of ranks to the keys of its column.

Ranks stand on a grid of a x c, a c = p; here a = 3, c = 2. Rank 4 computes the tile of row 3 4 5 and column 1 4:

                     keys of rank
                     0  1  2  3  4  5
                  0  .  .  .  .  .  .
    queries of    1  .  .  .  .  .  .       row:     ranks 3 4 5, gather queries, return results
    rank          2  .  .  .  .  .  .       column:  ranks 1 4, a ring of keys and values
                  3  .  #  .  .  #  .
                  4  .  #  .  .  #  .
                  5  .  #  .  .  #  .

Queries go once to the a ranks of their row and results come back to be merged
there; keys and values go around the ring of the c ranks of their column. A rank sends (a - 1) (2 Uq + Us) + (c - 1) 2 U
forward and (a - 1) (3 Uq + 2 Us) + (c - 1) 2 (U + Ug) backward, where Ring Attention sends (p - 1) 2 U and
(p - 1) 2 (U + Ug): U = s b g d and Uq = s b h d elements of the inputs, Ug = s b g d and Us = s b h of the accumulator.
Under a causal mask on the zigzag layout, summed over the ranks, the part of K and V is 3/4 of this and that of the
queries 1 - 1 / 4c of it; any two ranks have equally many unmasked pairs there, so all tiles have too.

The row is the inner axis, because the first queries and the last results are hidden by least work. Without hierarchical
sizes the grid that sends least under the mask is taken: around sqrt(p g / h) queries in a row.

Source: Liu et al. 2024 (WallFacer, later named StarTrail), arXiv:2407.00611; rectangular tiles: Chen et al. 2025
(Mesh-Attention), arXiv:2512.20968. The paper's own way of moving keys for a square number of ranks is backend
`startrail`: the same tiles and one loop for both, but a name of its own, since it takes other p and sends more.
"""

from collections.abc import Iterator

from torch import Tensor

from megatron_cp.comm import Members
from megatron_cp.context import cache_sizes
from megatron_cp.context.algorithms import rows_and_columns
from megatron_cp.context.algorithms.double_ring import between
from megatron_cp.context.algorithms.ring import circulating
from megatron_cp.context.algorithms.rows_and_columns import Tiling
from megatron_cp.context.layouts import Layout
from megatron_cp.context.masks import AnyMask
from megatron_cp.context.merge import widening
from megatron_cp.context.remembered import remembered
from megatron_cp.context.task import Block, Saved, Task
from megatron_cp.grid import Grid


def forward(q: Tensor, k: Tensor, v: Tensor, task: Task) -> tuple[Tensor, Saved]:
    """Attend: q [s b h d], k and v [s b g d] of this rank -> out [s b h d]; queries and results of a row are alive."""
    grid = _grid(q, task)
    # gather the row, circulate the column, return the row: the loop of `rows_and_columns`
    return rows_and_columns.forward(q, k, v, _column(k, v, grid, task), cells(task.layout, grid, task.mask), task)


def backward(dout: Tensor, saved: Saved, task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate: dout [s b h d] -> dq, dk, dv."""
    grid = _grid(dout, task)
    blocks = _column(saved.k, saved.v, grid, task)
    return rows_and_columns.backward(dout, saved, blocks, cells(task.layout, grid, task.mask), task)


def _column(k: Tensor, v: Tensor, grid: Grid, task: Task) -> Iterator[list[Block]]:
    """Yield the K and V of the column, a ring; tokens that no row further on sees stay behind."""
    me = task.fabric.rank
    members = grid.members("outer", me)
    column, way = Members(task.fabric, members), between(task.layout, grid, task.mask)[me % grid.inner]
    # the column is a ring of its own over the whole fabric's connections
    for block in circulating(Block(column.rank, 0, k, v, task.mine), way, column):
        yield [block._replace(owner=members[block.owner])]


@remembered(cache_sizes.LAYOUTS)
def cells(layout: Layout, grid: Grid, mask: AnyMask) -> Tiling:
    """Return each rank's tile: queries of its inner axis; keys of its outer axis, in the direction of its ring."""
    ranks, ways = range(len(layout)), between(layout, grid, mask)
    turns = [ways[rank % grid.inner].turn * grid.inner for rank in ranks]
    return Tiling(
        tuple(tuple(grid.members("inner", rank)) for rank in ranks),
        tuple(tuple(((rank - hop * turns[rank]) % len(layout),) for hop in range(grid.outer)) for rank in ranks),
    )


def _grid(like: Tensor, task: Task) -> Grid:
    return task.axes.grid if task.axes else least(task.layout, task.mask, *task.heads, widening(like))


@remembered(cache_sizes.LAYOUTS)
def least(layout: Layout, mask: AnyMask, heads: int, kv_heads: int, wide: int) -> Grid:
    """Return the grid on which both passes send the fewest elements over all ranks, row statistics left out.

    A sum's element is as large as `wide` of the inputs'.
    """
    ranks = len(layout)
    grids = [Grid(inner, ranks // inner) for inner in range(1, ranks + 1) if ranks % inner == 0]
    return min(grids, key=lambda grid: _elements(grid, layout, mask, heads, kv_heads, wide))


def _elements(grid: Grid, layout: Layout, mask: AnyMask, heads: int, kv_heads: int, wide: int) -> int:
    """Count the elements sent per batch entry and element of the head dim."""
    tiles, ring = cells(layout, grid, mask), sum(way.volume for way in between(layout, grid, mask))
    ranks = range(len(layout))
    rows = [tiles.used(owner, rank, layout, mask) for rank in ranks for owner in tiles.rows[rank] if owner != rank]
    columns = [
        tiles.wanted(owner, rank, layout, mask) for rank in ranks for (owner,) in tiles.hops[rank] if owner != rank
    ]
    queries, returned = (sum(part.stop - part.start for part in parts) for parts in (rows, columns))
    # q, out and q, dout, dq in the row; k, v twice around the ring; sums of dk, dv straight to the owners
    return 5 * heads * queries + 4 * kv_heads * ring + 2 * wide * kv_heads * returned
