import numpy as np
import pytest

from megatron_cp.context.layouts import LAYOUTS, gathered, layout
from megatron_cp.context.masks import CAUSAL, FULL, Mask, mask
from megatron_cp.context.tiles import seen, tiles

RANKS = [1, 2, 3, 4, 5, 6, 8]
MASKS = [FULL, CAUSAL, *(Mask(left, right) for left in (0, 1, 3, 7, 40, None) for right in (0, 2, 9, None))]
SHAPES = {"full": FULL, "lower": CAUSAL, "upper": Mask(left=0)}


def unmasked(tile):
    """Which queries see which keys where the last query has the last key's position."""
    rows, cols = tile.q.stop - tile.q.start, tile.kv.stop - tile.kv.start
    left, right = SHAPES.get(tile.shape, tile.shape)
    ends = np.arange(rows)[:, None] + cols - rows
    keys = np.arange(cols)[None]
    # no limit lies beyond all keys
    left, right = (rows + cols if limit is None else limit for limit in (left, right))
    return (keys >= ends - left) & (keys <= ends + right)


def pairs(tile):
    return [(i + tile.q.start, j + tile.kv.start) for i, j in np.argwhere(unmasked(tile)).tolist()]


def visible(q_runs, kv_runs, seen_by):
    return [(i, j) for i, j in np.argwhere(visible_matrix(q_runs, kv_runs, seen_by)).tolist()]


@pytest.mark.parametrize("seen_by", MASKS, ids=lambda m: f"{m.left}-{m.right}")
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_tiles_cover_mask_exactly_once(name, ranks, seen_by):
    owned = layout(name, 6 * ranks, ranks)
    blocks = [*owned, gathered(owned)[0]] if name != "striped" else owned
    for queries in owned:
        for keys in blocks:
            assert_covered(queries, keys, seen_by)


def assert_covered(queries, keys, seen_by):
    """Every unmasked pair lies in one tile, with and without windows; every query of a window sees a key."""
    expected = visible_matrix(queries, keys, seen_by)
    for windows in (False, True) if seen_by.window else (False,):
        found, counts = tiles(queries, keys, seen_by, windows=windows), np.zeros(expected.shape, dtype=int)
        for tile in found:
            sees = unmasked(tile)
            counts[tile.q, tile.kv] += sees
            assert sees.any(1).all()
            assert tile.pairs == sees.sum()
            assert tile.shape in SHAPES or sees.shape[0] <= sees.shape[1]
            # a negative limit means none to the kernels
            assert all(limit is None or limit >= 0 for limit in SHAPES.get(tile.shape, tile.shape))
        assert (counts == expected).all()
        assert windows or all(tile.shape in SHAPES for tile in found)


def visible_matrix(q_runs, kv_runs, seen_by):
    queries, keys = (np.array([position for run in runs for position in run]) for runs in (q_runs, kv_runs))
    distance = keys[None] - queries[:, None]
    left, right = (np.inf if limit is None else limit for limit in seen_by)
    return (distance >= -left) & (distance <= right)


@pytest.mark.parametrize("seen_by", MASKS, ids=lambda m: f"{m.left}-{m.right}")
@pytest.mark.parametrize("stripe", [2, 3, 5])
@pytest.mark.parametrize("ranks", [2, 3])
def test_tiles_of_stripes_of_blocks_cover_mask(ranks, stripe, seen_by):
    owned = layout("striped", 30 * ranks, ranks, stripe)
    for queries in owned:
        for keys in owned:
            assert_covered(queries, keys, seen_by)


@pytest.mark.parametrize("stairs", [2, 3, 7, 16])
def test_a_staircase_is_as_many_tiles_as_steps_and_none_is_flat(stairs):
    behind, ahead = layout("striped", 2 * 64 * stairs, 2, 64)
    found = tiles(ahead, behind, CAUSAL)
    assert len(found) == stairs
    for tile in found:
        rows, cols = tile.q.stop - tile.q.start, tile.kv.stop - tile.kv.start
        assert rows <= cols <= 2 * rows


@pytest.mark.parametrize("name", list(LAYOUTS))
@pytest.mark.parametrize("ranks", RANKS)
def test_each_causal_hop_is_at_most_one_kernel_call(name, ranks):
    owned = layout(name, 6 * ranks, ranks)
    assert max(len(tiles(a, b, CAUSAL)) for a in owned for b in owned) <= 1


@pytest.mark.parametrize("seen_by", MASKS, ids=lambda m: f"{m.left}-{m.right}")
@pytest.mark.parametrize("ranks", RANKS)
def test_tiles_of_interleaved_groups_cover_mask(ranks, seen_by):
    owned = layout("zigzag", 24 * ranks, 2 * ranks)
    groups = [gathered(owned[offset::ranks])[0] for offset in range(ranks)]
    for queries in groups:
        for keys in groups:
            assert_covered(queries, keys, seen_by)


@pytest.mark.parametrize("seen_by", MASKS, ids=lambda m: f"{m.left}-{m.right}")
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_triangles_are_square(name, seen_by):
    owned = layout(name, 48, 4)
    for tile in (tile for a in owned for b in owned for tile in tiles(a, b, seen_by) if tile.shape != "full"):
        assert tile.q.stop - tile.q.start == tile.kv.stop - tile.kv.start


@pytest.mark.parametrize("window", [1, 16, 100, 1000])
def test_a_window_costs_kernel_calls_in_proportion_to_its_share(window):
    (whole,) = layout("contiguous", 4096, 1)
    assert len(tiles(whole, whole, Mask(window, 0))) <= 3 * (4096 // window + 2)


@pytest.mark.parametrize("window", [0, 1, 16, 100, 4094])
@pytest.mark.parametrize("right", [0, 5])
def test_a_window_in_one_run_is_one_call_of_a_kernel_that_takes_windows(window, right):
    (whole,) = layout("contiguous", 4096, 1)
    (tile,) = tiles(whole, whole, Mask(window, right), windows=True)
    assert (tile.q, tile.kv, tile.shape) == (slice(0, 4096), slice(0, 4096), Mask(window, right))


@pytest.mark.parametrize(("tokens", "ranks", "window"), [(2**17, 8, 1023), (2**20, 32, 8191)])
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_a_window_costs_each_pair_of_ranks_two_calls_at_most(name, tokens, ranks, window):
    owned = layout(name, tokens, ranks)
    found = [len(tiles(queries, keys, Mask(window, 0), windows=True)) for queries in owned for keys in owned]
    assert max(found) <= (2 if name == "zigzag" else 1)


@pytest.mark.parametrize("seen_by", MASKS, ids=lambda m: f"{m.left}-{m.right}")
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_seen_is_the_shortest_stretch_with_all_visible_keys(name, seen_by):
    owned = layout(name, 48, 4)
    for queries in owned:
        for keys in owned:
            found = [j for _, j in visible(queries, keys, seen_by)]
            stretch = seen(queries, keys, seen_by)
            assert (stretch.start, stretch.stop) == ((min(found), max(found) + 1) if found else (0, 0))


def test_mask_takes_flash_attns_arguments():
    assert mask(True) == CAUSAL
    assert mask(False) == FULL
    assert mask(True, (512, -1)) == mask(True, (512, None)) == Mask(512, 0)
    assert mask(False, (3, 5)) == Mask(3, 5)
    with pytest.raises(ValueError, match="limits are 0 or more"):
        mask(True, (-2, 0))
