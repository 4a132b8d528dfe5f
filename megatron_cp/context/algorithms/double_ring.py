"""Double ring: a ring of windows around a ring inside each window, so that the slow links carry every block once.

The ranks next to each other on the inner axis are a window. A window's blocks go once around its inner ring; meanwhile
the blocks of the next window are on their way along the outer axis, where they have the whole inner ring's time. With
w ranks in a window and W windows, p = w W, a pass sends per rank 2 W (w - 1) U inside the windows and 2 (W - 1) U
between them, 2 (p - 1) U together as in a single ring; the backward pass sends that once for K and V and once for
their gradients. Under a causal mask on the zigzag layout each part is 3/4 of this, summed over the ranks.

Source: Gu et al. 2024 (LoongTrain), arXiv:2406.18485. There dK and dV circulate behind their blocks; here
the ranks of a window send them to the one that brought the block into the window, and it sends their sum home.
"""

from functools import cache

from torch import Tensor

from megatron_cp.context.algorithms.ring import Homecoming, Route, directed, shorter, visits
from megatron_cp.context.layouts import Layout
from megatron_cp.context.masks import Mask
from megatron_cp.context.merge import SoftmaxMerge, Sum
from megatron_cp.context.task import Block, Saved, Task
from megatron_cp.context.tiles import hull, seen
from megatron_cp.grid import Grid


def forward(q: Tensor, k: Tensor, v: Tensor, task: Task) -> tuple[Tensor, Saved]:
    """q [s b h d], k and v [s b g d] of this rank -> out [s b h d]; four visiting blocks are alive at a time."""
    assert task.axes
    inner, outer = task.axes.inner, task.axes.outer
    merge = SoftmaxMerge(q)
    for brought in visits(Block(outer.rank, 0, k, v, task.mine), _between(task), outer):
        for block in visits(brought._replace(owner=inner.rank), _inside(task, brought.owner), inner):
            task.attend(merge, q, block)
    out, lse = merge.result()
    return out, Saved(q, k, v, out, lse)


def backward(dout: Tensor, saved: Saved, task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """dout [s b h d] -> dq, dk, dv.

    A window's sum of dK and dV is rounded when it leaves for the owner, its parts when they leave for the rank that
    adds them up; all sums are float32.
    """
    assert task.axes
    inner, outer = task.axes.inner, task.axes.outer
    dq, dk, dv = Sum(saved.q), Sum(saved.k), Sum(saved.v)
    mine, way = Block(outer.rank, 0, saved.k, saved.v, task.mine), _between(task)
    home = Homecoming(mine, dk, dv, way, outer)
    for brought in visits(mine, way, outer):
        dk_window, dv_window = home.sums(brought)
        held, around = brought._replace(owner=inner.rank), _inside(task, brought.owner)
        window = Homecoming(held, dk_window, dv_window, around, inner)
        for block in visits(held, around, inner):
            dk_block, dv_block = window.sums(block)
            task.attend_backward(dq, dk_block, dv_block, dout, saved, block)
            window.start(block, dk_block, dv_block)
        window.finish()
        home.start(brought, dk_window, dv_window)
    home.finish()
    return dq.result(), dk.result(), dv.result()


def _between(task: Task) -> Route:
    assert task.axes
    return between(task.runs, task.axes.grid, task.mask)[task.axes.inner.rank]


def _inside(task: Task, source: int) -> Route:
    """The ring of this rank's window over the blocks of window `source`."""
    assert task.axes
    windows = _windows(task.runs, task.axes.grid)
    return inside(windows[task.axes.outer.rank], windows[source], task.mask)


@cache
def inside(queries: Layout, keys: Layout, mask: Mask) -> Route:
    """The inner ring in which ranks with these queries pass on blocks with these keys."""
    return shorter(keys, tuple(tuple(seen(mine, block, mask) for mine in queries) for block in keys))


@cache
def between(runs: Layout, grid: Grid, mask: Mask) -> tuple[Route, ...]:
    """The outer rings, one per rank of a window; they turn the same way, so that whole windows travel together."""
    windows = _windows(runs, grid)
    columns = tuple(zip(*windows, strict=True))
    wanted = [
        tuple(tuple(hull(tuple(seen(mine, block, mask) for mine in window)) for window in windows) for block in column)
        for column in columns
    ]
    turns = [
        tuple(directed(column, want, turn) for column, want in zip(columns, wanted, strict=True)) for turn in (1, -1)
    ]
    return min(turns, key=lambda ways: sum(way.volume for way in ways))


def _windows(runs: Layout, grid: Grid) -> tuple[Layout, ...]:
    return tuple(runs[start : start + grid.inner] for start in range(0, len(runs), grid.inner))
