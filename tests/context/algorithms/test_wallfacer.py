"""Tiles of queries and keys: any grid, traffic, equal work, and the choice of the grid."""

import pytest
import torch.distributed as dist

from megatron_cp.comm import GroupFabric, axes_of, in_process
from megatron_cp.context.algorithms.startrail import teams
from megatron_cp.context.algorithms.wallfacer import cells, least
from megatron_cp.context.attend import plan
from megatron_cp.context.layouts import layout
from megatron_cp.context.masks import CAUSAL, FULL
from megatron_cp.context.tiles import tiles
from megatron_cp.grid import Grid
from tests.cases import slow_unless
from tests.context.dense import problem
from tests.context.test_backends import RANKS, assert_equals_dense, grids, sharded
from tests.ranks import run_ranks

GRIDS = [grid for ranks in RANKS for grid in grids(ranks)]
TEAMS = [Grid(1, 2), Grid(1, 3), Grid(1, 4), Grid(2, 2), Grid(1, 5), Grid(1, 8), Grid(2, 4)]
BYTES = 8


def by_grid(grid):
    return f"{grid.inner}x{grid.outer}"


def assert_exact(backend, grid, task, outside="zigzag"):
    ranks = grid.inner * grid.outer
    parts = in_process(ranks, lambda fabric: sharded(fabric, task, backend, grid, outside=outside))
    assert_equals_dense(parts, task)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2)], ids=lambda n: f"h{n}")
@pytest.mark.parametrize("grid", GRIDS, ids=by_grid)
def test_wallfacer_on_any_grid_equals_dense(grid, heads, kv_heads, causal):
    assert_exact("wallfacer", grid, problem(12 * grid.inner * grid.outer, heads, kv_heads, causal=causal))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("grid", [*TEAMS, Grid(3, 3), Grid(2, 6), Grid(4, 4)], ids=by_grid)
def test_startrail_with_any_team_equals_dense(grid, causal):
    assert_exact("startrail", grid, problem(4 * grid.inner * grid.outer, 4, 2, causal=causal))


@pytest.mark.parametrize("outside", ["contiguous", "striped"])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, (5, None)), (False, (9, 4)), (False, (0, 2))])
@pytest.mark.parametrize(
    ("backend", "grid"),
    [("wallfacer", Grid(2, 2)), ("wallfacer", Grid(3, 2)), ("wallfacer", Grid(4, 1)), ("startrail", Grid(2, 2))],
    ids=str,
)
def test_tiles_of_any_layout_and_window_equal_dense(backend, grid, causal, window, outside):
    task = problem(12 * grid.inner * grid.outer, 4, 2, causal=causal)._replace(window=window)
    assert_exact(backend, grid, task, outside)


def sent(backend, grid, causal, heads=8, kv_heads=2):
    """Elements that each rank sends forward and backward together, and U, Uq, Us of one rank."""
    ranks = grid.inner * grid.outer
    task = problem(12 * ranks, heads, kv_heads, causal=causal)

    def body(fabric):
        sharded(fabric, task, backend, grid)
        return fabric.sent // BYTES

    return in_process(ranks, body), *(tensor.numel() // ranks for tensor in (task.k, task.q, task.q[..., 0]))


@pytest.mark.parametrize("grid", GRIDS, ids=by_grid)
def test_wallfacer_sends_queries_along_rows_and_keys_along_columns(grid):
    counted, u, uq, us = sent("wallfacer", grid, causal=False)
    a, c = grid.sizes
    forward = (a - 1) * (2 * uq + us) + (c - 1) * 2 * u
    backward = (a - 1) * (3 * uq + 2 * us) + (c - 1) * 4 * u
    assert counted == [forward + backward] * (a * c)


@pytest.mark.parametrize("grid", GRIDS, ids=by_grid)
def test_causal_wallfacer_leaves_what_nobody_sees(grid):
    counted, u, uq, us = sent("wallfacer", grid, causal=True)
    a, c = grid.sizes
    # 1 - 1 / 4c of the queries, 3/4 of the keys
    queries, keys = (4 * c - 1) * (a - 1) * (5 * uq + 3 * us), 3 * (c - 1) * 6 * u
    assert 4 * c * sum(counted) == a * c * (queries + c * keys)


@pytest.mark.parametrize("grid", TEAMS, ids=by_grid)
def test_startrail_sends_what_the_paper_says_and_gradients_home(grid):
    counted, u, uq, us = sent("startrail", grid, causal=False)
    size, ranks = grid.inner, grid.inner * grid.outer
    for rank, found in enumerate(counted):
        team, ring = divmod(rank, size)
        own = team // (grid.outer // size) == ring
        keys = (size - 1) * 2 * u + (0 if own else 2 * size * u) + (ranks // size**2 - 1) * 2 * size * u
        queries = (size - 1) * (5 * uq + 3 * us)
        assert found == queries + 2 * keys + 2 * u * (ranks // size - own)


@pytest.mark.parametrize("name", ["zigzag", "contiguous"])
@pytest.mark.parametrize(
    ("tiling", "ranks"),
    [(cells(layout("zigzag", 4 * ranks, ranks), grid, CAUSAL), ranks) for ranks in (6, 16) for grid in grids(ranks)]
    + [(teams(Grid(2, 4)), 8), (teams(Grid(4, 4)), 16), (teams(Grid(2, 8)), 16)],
)
def test_every_pair_of_ranks_meets_once_and_zigzag_tiles_are_equal(tiling, ranks, name):
    met = [(q, k) for row, hops in zip(*tiling, strict=True) for q in row for hop in hops for k in hop]
    assert sorted(met) == [(q, k) for q in range(ranks) for k in range(ranks)]
    runs = layout(name, 4 * ranks, ranks)
    work = [
        sum(tile.pairs for q in row for hop in hops for k in hop for tile in tiles(runs[q], runs[k], CAUSAL))
        for row, hops in zip(*tiling, strict=True)
    ]
    # a rank's own pairs are a triangle with its diagonal
    diagonals = [sum(k in row for hop in hops for k in hop) for row, hops in zip(*tiling, strict=True)]
    balanced = [found - 2 * both for found, both in zip(work, diagonals, strict=True)]
    assert (len(set(balanced)) == 1) == (name == "zigzag" or ranks == 1)


@pytest.mark.parametrize(
    ("ranks", "heads", "kv_heads", "wide", "mask", "grid"),
    [
        (16, 8, 8, 1, FULL, Grid(4, 4)),
        (16, 8, 2, 1, FULL, Grid(2, 8)),
        (64, 8, 8, 1, FULL, Grid(8, 8)),
        (64, 32, 8, 1, FULL, Grid(4, 16)),
        (64, 64, 8, 1, FULL, Grid(4, 16)),
        (7, 8, 1, 1, FULL, Grid(1, 7)),
        (2, 8, 8, 1, FULL, Grid(2, 1)),
        # float32 sums of bfloat16 gradients make keys dearer
        (12, 8, 1, 1, FULL, Grid(1, 12)),
        (12, 8, 1, 2, FULL, Grid(2, 6)),
    ],
)
def test_without_sizes_the_grid_that_sends_least_is_taken(ranks, heads, kv_heads, wide, mask, grid):
    assert least(layout("zigzag", 4 * ranks, ranks), mask, heads, kv_heads, wide) == grid


@pytest.mark.parametrize(("heads", "kv_heads"), slow_unless([(8, 1)], [(4, 4), (8, 1)]), ids=lambda n: f"h{n}")
@pytest.mark.parametrize(
    ("backend", "ranks", "causal", "window"),
    [
        *(("wallfacer", ranks, *mask) for ranks in (6, 8) for mask in ((False, None), (True, None), (True, (1, None)))),
        ("wallfacer", 8, False, (20, 20)),
        # it moves whole keys under any mask, and counts whole queries
        *(("startrail", ranks, False, None) for ranks in (4, 8)),
    ],
)
def test_no_other_grid_sends_less(backend, ranks, heads, kv_heads, causal, window):
    task = problem(12 * ranks, heads, kv_heads, causal=causal, dim=32, batch=1)._replace(window=window)

    def total(grid=None):
        def body(fabric):
            sharded(fabric, task, backend, grid)
            return fabric.sent

        return sum(in_process(ranks, body))

    fitting = [grid for grid in grids(ranks) if backend == "wallfacer" or grid in TEAMS]
    assert total() == min(map(total, fitting))


def test_teams_that_do_not_fit_are_refused_by_the_plan():
    def body(fabric):
        inner, outer = axes_of(Grid(4, 2), fabric)
        with pytest.raises(
            ValueError, match=r"divisible by the square .* got 8 and 4; possible are 1, 2, backend 'wall"
        ):
            plan("startrail", cp=fabric, inner=inner, outer=outer)
        return fabric.sent

    assert in_process(8, body) == [0] * 8


def over_gloo(task, backend, grid):
    dist.init_process_group("gloo")
    fabric = GroupFabric(dist.group.WORLD)
    part = sharded(fabric, task, backend, grid, kernel="torch")
    dist.barrier()
    return part, fabric.sent


@pytest.mark.parametrize(
    ("backend", "grid"),
    [("wallfacer", Grid(2, 2)), ("wallfacer", Grid(4, 1)), ("startrail", Grid(2, 2))],
    ids=str,
)
def test_tiles_over_gloo_equal_dense_and_send_as_many_bytes(backend, grid):
    task = problem(48, 8, 2, causal=True)
    parts, counted = zip(*run_ranks(4, over_gloo, task, backend, grid), strict=True)
    assert_equals_dense(parts, task)
    assert list(counted) == [BYTES * elements for elements in sent(backend, grid, causal=True)[0]]
