"""Rows of experts that are computed: what a capacity drops, and how uneven ranks are."""

import math

import pytest

from megatron_cp.experts.routed import EVEN, RoutedRows, Routing, loads_of, routed, taken


def exactly_taken(choices, load, capacity):
    """E min(X, C) of a binomial X, by the sum over all of its values."""
    chances = (math.comb(choices, x) * load**x * (1 - load) ** (choices - x) for x in range(choices + 1))
    return sum(min(x, capacity) * chance for x, chance in enumerate(chances))


# 512 tokens with 2 choices of 64 experts, and factors of 0.5, 1, 1.25 and 2; a busy expert; one that all ask for
@pytest.mark.parametrize(
    ("choices", "load", "capacity"),
    [(1024, 1 / 64, 8), (1024, 1 / 64, 16), (1024, 1 / 64, 20), (1024, 1 / 64, 32), (1000, 0.3, 150), (100, 1.0, 40)],
)
def test_an_expert_takes_as_many_as_the_binomial_distribution_says(choices, load, capacity):
    found = taken(choices, load, capacity)
    assert found == pytest.approx(exactly_taken(choices, load, capacity), rel=0.01)
    assert found <= min(choices * load, capacity)


def test_an_even_share_drops_what_varies_by_chance():
    # m = 2 * 512 / 64 = 16 tokens an expert: s / sqrt(2 pi) are too many, s^2 = 16 * 63/64
    rows = routed(Routing(factor=1.0, group=512), 4096, 2, 64, 8)
    dropped = math.sqrt(16 * 63 / 64 / (2 * math.pi)) / 16
    assert rows.mean == pytest.approx(2 * (1 - dropped))
    assert rows.busiest == pytest.approx(rows.mean)
    # groups of 512 drop as a microbatch of 512 tokens does, and half of a share is taken by all
    assert rows == pytest.approx(routed(Routing(factor=1.0), 512, 2, 64, 8))
    assert routed(Routing(factor=0.5), 4096, 2, 64, 8).mean == pytest.approx(1.0, rel=1e-4)


def test_padding_is_computed_whatever_the_load():
    # ceil(1.25 * 100 * 2 / 8) = 32 rows for each of 8 experts and 100 tokens
    for skew in (0.0, 1.2):
        rows = routed(Routing(factor=1.25, padded=True, skew=skew), 100, 2, 8, 4)
        assert rows == pytest.approx(RoutedRows(8 * 32 / 100, 8 * 32 / 100))


def test_without_capacity_the_busiest_rank_follows_zipfs_law():
    # 1, 1/2, 1/3, 1/4 of 25/12: the first two experts have 18/25 of all rows, where an even rank has half
    assert loads_of(4, 1.0) == pytest.approx([12 / 25, 6 / 25, 4 / 25, 3 / 25])
    assert routed(Routing(skew=1.0), 100, 2, 4, 2) == pytest.approx(RoutedRows(2, 2 * 2 * 18 / 25))
    assert routed(EVEN, 100, 2, 4, 2) == RoutedRows(2, 2)


def test_a_capacity_bounds_the_busiest_rank():
    free, bound = (routed(Routing(factor=factor, skew=1.0), 1e6, 1, 4, 4) for factor in (None, 1.5))
    # of a million tokens chance takes none: experts with 48 and 24 in a hundred, which take 37.5 at most
    assert free.busiest == pytest.approx(4 * 0.48)
    assert bound == pytest.approx(RoutedRows(0.375 + 0.24 + 0.16 + 0.12, 4 * 0.375))
