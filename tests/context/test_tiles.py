import pytest

from megatron_cp.context.layouts import LAYOUTS, gathered, layout
from megatron_cp.context.masks import CAUSAL, FULL, Mask, mask
from megatron_cp.context.tiles import seen, tiles

RANKS = [1, 2, 3, 4, 5, 6, 8]
MASKS = [FULL, CAUSAL, *(Mask(left, right) for left in (0, 1, 3, 7, 40, None) for right in (0, 2, 9, None))]
SQUARE = {"full": lambda i, j: True, "lower": lambda i, j: j <= i, "upper": lambda i, j: j >= i}


def pairs(tile):
    rows, cols = range(tile.q.start, tile.q.stop), range(tile.kv.start, tile.kv.stop)
    return [(i, j) for a, i in enumerate(rows) for b, j in enumerate(cols) if SQUARE[tile.shape](a, b)]


def visible(q_runs, kv_runs, seen_by):
    queries = [position for run in q_runs for position in run]
    keys = [position for run in kv_runs for position in run]
    left = len(queries) * 100 if seen_by.left is None else seen_by.left
    right = len(queries) * 100 if seen_by.right is None else seen_by.right
    return sorted((i, j) for i, a in enumerate(queries) for j, b in enumerate(keys) if a - left <= b <= a + right)


@pytest.mark.parametrize("seen_by", MASKS, ids=lambda m: f"{m.left}-{m.right}")
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_tiles_cover_mask_exactly_once(name, ranks, seen_by):
    owned = layout(name, 6 * ranks, ranks)
    blocks = [*owned, gathered(owned)[0]] if name != "striped" else owned
    for queries in owned:
        for keys in blocks:
            found = tiles(queries, keys, seen_by)
            expected = visible(queries, keys, seen_by)
            assert sorted(pair for tile in found for pair in pairs(tile)) == expected
            assert sum(tile.pairs for tile in found) == len(expected)


@pytest.mark.parametrize("seen_by", MASKS, ids=lambda m: f"{m.left}-{m.right}")
@pytest.mark.parametrize("stripe", [2, 3, 5])
@pytest.mark.parametrize("ranks", [2, 3])
def test_tiles_of_stripes_of_blocks_cover_mask(ranks, stripe, seen_by):
    owned = layout("striped", 30 * ranks, ranks, stripe)
    for queries in owned:
        for keys in owned:
            covered = sorted(pair for tile in tiles(queries, keys, seen_by) for pair in pairs(tile))
            assert covered == visible(queries, keys, seen_by)


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
            covered = sorted(pair for tile in tiles(queries, keys, seen_by) for pair in pairs(tile))
            assert covered == visible(queries, keys, seen_by)


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
