"""A ring of rings: traffic inside a window of ranks, and between windows."""

import pytest
import torch

from megatron_cp.comm import in_process
from megatron_cp.context.algorithms.double_ring import between, inside
from megatron_cp.context.attend import attend, plan
from megatron_cp.context.layouts import indices, layout
from megatron_cp.context.masks import CAUSAL, Mask
from megatron_cp.grid import Grid
from tests.context.dense import problem
from tests.context.test_backends import grids

GRIDS = [grid for ranks in (2, 3, 4, 6, 8) for grid in grids(ranks)]
BYTES = 8


def by_grid(grid):
    return f"{grid.inner}x{grid.outer}"


def sent(grid, **choices):
    """Per rank the bytes sent inside windows and between them, forward and backward, and the size of one rank's K."""
    ranks = grid.inner * grid.outer
    task = problem(12 * ranks, 8, 2, causal=True)

    def body(fabric):
        axes = {axis: fabric.subset(grid.members(axis, fabric.rank)) for axis in ("inner", "outer")}
        mine = torch.tensor(indices("zigzag", 12 * ranks, ranks, fabric.rank))
        q, k, v = (x[mine].requires_grad_() for x in task[:3])
        out = attend(q, k, v, plan("double-ring", cp=fabric, kernel="reference", **axes, **choices))
        forward = axes["inner"].sent, axes["outer"].sent
        out.backward(task.dout[mine])
        return forward, (axes["inner"].sent - forward[0], axes["outer"].sent - forward[1]), fabric.sent

    return in_process(ranks, body), task.k.numel() // ranks * BYTES


@pytest.mark.parametrize("grid", GRIDS, ids=by_grid)
def test_full_mask_sends_each_block_once_between_windows(grid):
    inner, outer = grid.sizes
    counted, unit = sent(grid, causal=False)
    forward = 2 * outer * (inner - 1) * unit, 2 * (outer - 1) * unit
    # K and V again, and their gradients
    backward = 2 * forward[0], 2 * forward[1]
    assert counted == [(forward, backward, 0)] * (inner * outer)
    assert sum(forward) == 2 * (inner * outer - 1) * unit


@pytest.mark.parametrize("grid", GRIDS, ids=by_grid)
def test_causal_zigzag_sends_three_quarters_inside_and_between(grid):
    inner, outer = grid.sizes
    counted, unit = sent(grid, causal=True)
    ranks = inner * outer
    full = ranks * 2 * outer * (inner - 1) * unit, ranks * 2 * (outer - 1) * unit
    for axis in (0, 1):
        assert sum(forward[axis] for forward, _, _ in counted) == 0.75 * full[axis]
        assert sum(backward[axis] for _, backward, _ in counted) == 0.75 * 2 * full[axis]


@pytest.mark.parametrize("grid", [Grid(2, 3), Grid(4, 4), Grid(3, 5)], ids=by_grid)
@pytest.mark.parametrize("name", ["zigzag", "contiguous", "striped"])
@pytest.mark.parametrize("mask", [CAUSAL, Mask(7, 0), Mask(2, 5)], ids=str)
def test_windows_travel_together_and_carry_what_is_wanted(grid, name, mask):
    runs = layout(name, 12 * grid.inner * grid.outer, grid.inner * grid.outer)
    ways = between(runs, grid, mask)
    assert len({way.turn for way in ways}) == 1
    windows = [runs[start : start + grid.inner] for start in range(0, len(runs), grid.inner)]
    for source, keys in enumerate(windows):
        for window, queries in enumerate(windows):
            around = inside(queries, keys, mask)
            for rank, way in enumerate(ways):
                brought = way.carried[source][(window - source) * way.turn % grid.outer]
                assert all(within(wanted, brought) for wanted in around.carried[rank])


def within(part, stretch):
    return part.start == part.stop or stretch.start <= part.start <= part.stop <= stretch.stop


def test_window_of_positions_leaves_far_windows_of_ranks_alone():
    runs = layout("contiguous", 96, 8)
    ways = between(runs, Grid(2, 4), Mask(12, 0))
    # a block of 12 tokens reaches the next window of ranks from the last rank of a window only
    arrived = [[tuple(part.stop - part.start for part in hops[1:]) for hops in way.carried] for way in ways]
    assert arrived == [[(0, 0, 0)] * 4, [(12, 0, 0)] * 3 + [(0, 0, 0)]]


def test_without_sizes_it_says_which_to_give():
    def body(fabric):
        with pytest.raises(ValueError, match="'double-ring' needs two axes of ranks; give inner= and outer="):
            plan("double-ring", cp=fabric)
        with pytest.raises(ValueError, match=r"inner of 2 and outer of 2 ranks must make the 2 ranks of cp"):
            plan("double-ring", cp=fabric, inner=fabric, outer=fabric)
        return fabric.sent

    assert in_process(2, body) == [0, 0]
