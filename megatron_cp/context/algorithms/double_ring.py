"""Double ring: a ring of windows around a ring inside each window, so that the slow links carry every block once.

The ranks next to each other on the inner axis are a window. A window's blocks go once around its inner ring; meanwhile
the blocks of the next window are on their way along the outer axis, where they have the whole inner ring's time. With
w ranks in a window and W windows, p = w W, a pass sends per rank 2 W (w - 1) U inside the windows and 2 (W - 1) U
between them, 2 (p - 1) U together as in a single ring; the backward pass sends that once for K and V and once, in
float32, for their gradients. Under a causal mask on the zigzag layout each part is 3/4 of this, summed over the ranks.

Source: Gu et al. 2024 (LoongTrain), arXiv:2406.18485. There dK and dV circulate behind their blocks; here
the ranks of a window send them to the one that brought the block into the window, and it sends their sum to the owner.
"""

from torch import Tensor

from megatron_cp.context import cache_sizes
from megatron_cp.context.algorithms.ring import GradientReturns, circulating, directed, shorter
from megatron_cp.context.circulate import Route
from megatron_cp.context.layouts import Layout
from megatron_cp.context.masks import AnyMask
from megatron_cp.context.merge import SoftmaxMerge, Sum
from megatron_cp.context.remembered import remembered
from megatron_cp.context.task import Block, Saved, Task
from megatron_cp.context.tiles import hull, seen
from megatron_cp.grid import Grid


def forward(q: Tensor, k: Tensor, v: Tensor, task: Task) -> tuple[Tensor, Saved]:
    """Attend: q [s b h d], k and v [s b g d] of this rank -> out [s b h d]; four blocks of others are alive."""
    assert task.axes
    inner, outer = task.axes.inner, task.axes.outer
    merge = SoftmaxMerge(q, v.shape[3])
    # 1. outer ring: pass the block on to the next window, and receive another window's during the whole inner ring
    for brought in circulating(Block(outer.rank, 0, k, v, task.mine), _between(task), outer):
        # 2. inner ring: the blocks of that window go around inside this one
        for block in circulating(brought._replace(owner=inner.rank), _inside(task, brought.owner), inner):
            # 3. attend to the block at hand, merged by online softmax
            task.attend(merge, q, block)
    out, lse = merge.result()
    return out, Saved(q, k, v, out, lse)


def backward(dout: Tensor, saved: Saved, task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate: dout [s b h d] -> dq, dk, dv.

    A window's sum of dK and dV travels in float32, and so do its parts on their way to the rank that adds them up.
    """
    assert task.axes
    inner, outer = task.axes.inner, task.axes.outer
    dq, dk, dv = Sum(saved.q), Sum(saved.k), Sum(saved.v)
    mine, way = Block(outer.rank, 0, saved.k, saved.v, task.mine), _between(task)
    to_owners = GradientReturns(mine, dk, dv, way, outer)
    # 1. outer ring, as in the forward pass
    for brought in circulating(mine, way, outer):
        dk_window, dv_window = to_owners.sums(brought)
        held, around = brought._replace(owner=inner.rank), _inside(task, brought.owner)
        in_window = GradientReturns(held, dk_window, dv_window, around, inner)
        # 2. inner ring, as in the forward pass
        for block in circulating(held, around, inner):
            # 3. add to dq here, and to this rank's part of the block's dk and dv
            dk_block, dv_block = in_window.sums(block)
            task.attend_backward(dq, dk_block, dv_block, dout, saved, block)
            # 4. return that part to the rank that brought the block into the window
            in_window.start(block, dk_block, dv_block)
        in_window.finish()
        # 5. return the window's sum to the owner of the block
        to_owners.start(brought, dk_window, dv_window)
    to_owners.finish()
    return dq.result(), dk.result(), dv.result()


def _between(task: Task) -> Route:
    assert task.axes
    return between(task.layout, task.axes.grid, task.mask)[task.axes.inner.rank]


def _inside(task: Task, source: int) -> Route:
    """Return the route inside this rank's window of the blocks of window `source`."""
    assert task.axes
    windows = _windows(task.layout, task.axes.grid)
    return inside(windows[task.axes.outer.rank], windows[source], task.mask)


@remembered(cache_sizes.PAIRS)
def inside(queries: Layout, keys: Layout, mask: AnyMask) -> Route:
    """Return the route on the inner ring: ranks with these queries pass on blocks with these keys."""
    return shorter(keys, tuple(tuple(seen(mine, block, mask) for mine in queries) for block in keys))


@remembered(cache_sizes.LAYOUTS)
def between(layout: Layout, grid: Grid, mask: AnyMask) -> tuple[Route, ...]:
    """Return the routes on the outer rings, one per rank of a window; all turn one way, so windows stay together."""
    windows = _windows(layout, grid)
    columns = tuple(zip(*windows, strict=True))
    wanted = [
        tuple(tuple(hull(tuple(seen(mine, block, mask) for mine in window)) for window in windows) for block in column)
        for column in columns
    ]
    turns = [
        tuple(directed(column, want, turn) for column, want in zip(columns, wanted, strict=True)) for turn in (1, -1)
    ]
    return min(turns, key=lambda ways: sum(way.volume for way in ways))


def _windows(layout: Layout, grid: Grid) -> tuple[Layout, ...]:
    return tuple(layout[start : start + grid.inner] for start in range(0, len(layout), grid.inner))
