import pytest

from megatron_cp.context.layouts import LAYOUTS, gathered, layout
from megatron_cp.context.tiles import seen, tiles

RANKS = [1, 2, 3, 4, 5, 6, 8]


def pairs(tile):
    rows, cols = range(tile.q.start, tile.q.stop), range(tile.kv.start, tile.kv.stop)
    return [(i, j) for a, i in enumerate(rows) for b, j in enumerate(cols) if not tile.causal or b <= a]


def visible(q_runs, kv_runs, causal):
    queries = [position for run in q_runs for position in run]
    keys = [position for run in kv_runs for position in run]
    return sorted((i, j) for i, a in enumerate(queries) for j, b in enumerate(keys) if b <= a or not causal)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_tiles_cover_mask_exactly_once(name, ranks, causal):
    owned = layout(name, 6 * ranks, ranks)
    blocks = [*owned, gathered(owned)[0]] if name != "striped" else owned
    for queries in owned:
        for keys in blocks:
            covered = sorted(pair for tile in tiles(queries, keys, causal) for pair in pairs(tile))
            assert covered == visible(queries, keys, causal)


@pytest.mark.parametrize("name", list(LAYOUTS))
@pytest.mark.parametrize("ranks", RANKS)
def test_each_hop_is_at_most_one_kernel_call(name, ranks):
    owned = layout(name, 6 * ranks, ranks)
    assert max(len(tiles(a, b, True)) for a in owned for b in owned) <= 1


@pytest.mark.parametrize("ranks", RANKS)
def test_tiles_of_interleaved_groups_cover_mask(ranks):
    owned = layout("zigzag", 24 * ranks, 2 * ranks)
    groups = [gathered(owned[offset::ranks])[0] for offset in range(ranks)]
    for queries in groups:
        for keys in groups:
            covered = sorted(pair for tile in tiles(queries, keys, True) for pair in pairs(tile))
            assert covered == visible(queries, keys, True)


def test_causal_tiles_are_square():
    for name in LAYOUTS:
        owned = layout(name, 48, 4)
        for tile in (tile for a in owned for b in owned for tile in tiles(a, b, True) if tile.causal):
            assert tile.q.stop - tile.q.start == tile.kv.stop - tile.kv.start


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_seen_is_the_last_visible_key(name):
    owned = layout(name, 48, 4)
    for queries in owned:
        for keys in owned:
            assert seen(queries, keys, True) == max((j + 1 for _, j in visible(queries, keys, True)), default=0)
