import itertools

import pytest

from megatron_cp.context.layouts import LAYOUTS, cut, gathered, join, layout, length, moves

RANKS = [1, 2, 3, 4, 5, 6, 7, 8]


def local_positions(runs):
    return [position for run in runs for position in run]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_layout_owns_every_position_once(name, ranks):
    owned = [position for runs in layout(name, 30 * ranks, ranks) for position in local_positions(runs)]
    assert sorted(owned) == list(range(30 * ranks))


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(("before", "after"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_moves_turn_one_layout_into_another(before, after, ranks):
    old, new = layout(before, 30 * ranks, ranks), layout(after, 30 * ranks, ranks)
    have = [local_positions(runs) for runs in old]
    got = [[None] * 30 for _ in range(ranks)]
    for move in moves(old, new):
        got[move.dst][move.dst_tokens] = have[move.src][move.src_tokens]
    assert got == [local_positions(runs) for runs in new]


@pytest.mark.parametrize("members", [[0, 1], [2, 3], [0, 2], [1, 3], [3], [0, 1, 2, 3]])
@pytest.mark.parametrize("name", ["zigzag", "contiguous"])
def test_gathered_puts_every_stretch_in_its_place(name, members):
    chosen = tuple(layout(name, 48, 4)[rank] for rank in members)
    runs, places = gathered(chosen)
    whole = [None] * length(runs)
    for place in places:
        whole[place.whole] = local_positions(chosen[place.rank])[place.local]
    assert whole == local_positions(runs) == sorted(whole)


def test_gathered_refuses_interleaved_runs():
    with pytest.raises(ValueError, match="interleave"):
        gathered(layout("striped", 16, 4))


@pytest.mark.parametrize(
    ("name", "tokens", "fits"), [("zigzag", 1000, 1008), ("contiguous", 1001, 1008), ("striped", 7, 8)]
)
def test_layout_names_the_nearest_length_that_fits(name, tokens, fits):
    with pytest.raises(ValueError, match=f"got S = {tokens}; pad to {fits}$"):
        layout(name, tokens, 8)


@pytest.mark.parametrize("ranks", RANKS)
def test_one_position_has_step_one(ranks):
    """Ranges of one position are equal at any step, and so are keys of a cache."""
    (mine, *_) = layout("striped", 3 * ranks, ranks)
    short = [*layout("striped", ranks, ranks), cut(mine, slice(2, 3)), cut(mine, slice(0, 1)), join([range(4, 9, 7)])]
    assert [run.step for runs in short for run in runs] == [1] * len(short)
    assert [run.step for run in cut(mine, slice(1, 3))] == [ranks]
