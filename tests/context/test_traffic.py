"""What travels: counted by the fabrics, equal to the formulas of the menu."""

import pytest

from megatron_cp.comm import in_process
from megatron_cp.context.algorithms.ring import route
from megatron_cp.context.heads import deal
from megatron_cp.context.layouts import layout
from megatron_cp.context.masks import CAUSAL, FULL, Mask
from tests.context.dense import problem
from tests.context.test_backends import sharded

RANKS = [2, 3, 4, 5, 8]
BYTES = 8


def sent(ranks, backend, causal, heads=8, kv_heads=2):
    """Bytes that each rank sends, forward and backward, and the size of one rank's K in bytes."""
    task = problem(12 * ranks, heads, kv_heads, causal=causal)

    def body(fabric):
        sharded(fabric, task, backend)
        return fabric.sent

    return in_process(ranks, body), task.k.numel() // ranks * BYTES


@pytest.mark.parametrize("ranks", RANKS)
def test_full_ring_sends_every_block_to_everybody_and_gradients_home(ranks):
    bytes_sent, unit = sent(ranks, "zigzag", causal=False)
    assert bytes_sent == [2 * (ranks - 1) * unit * 3] * ranks


@pytest.mark.parametrize(("name", "share"), [("zigzag", 0.75), ("contiguous", 0.5)])
@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 6, 7, 8, 16, 64])
def test_causal_ring_carries_only_what_someone_further_on_sees(name, ranks, share):
    tokens = 4 * ranks
    full = route(layout(name, tokens, ranks), FULL).volume
    assert route(layout(name, tokens, ranks), CAUSAL).volume == share * full


@pytest.mark.parametrize("ranks", RANKS)
def test_causal_zigzag_sends_three_quarters(ranks):
    bytes_sent, unit = sent(ranks, "zigzag", causal=True)
    assert sum(bytes_sent) == 0.75 * ranks * 2 * (ranks - 1) * unit * 3


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ulysses_sends_its_share_of_each_tensor(ranks):
    bytes_sent, unit = sent(ranks, "ulysses", causal=True, heads=8, kv_heads=8)
    # q, k, v, out forward; dout, dq, dk, dv backward
    assert bytes_sent == [8 * unit * (ranks - 1) // ranks] * ranks


def test_kv_head_goes_to_each_rank_that_needs_it_and_to_no_other():
    hands = deal(8, 2, 4)
    assert [hand.stop - hand.start for hand in hands.q] == [2, 2, 2, 2]
    assert [(hand.start, hand.stop) for hand in hands.kv] == [(0, 1), (0, 1), (1, 2), (1, 2)]


@pytest.mark.parametrize("ranks", RANKS)
def test_all_gather_sends_what_others_see_and_gradients_of_what_was_seen(ranks):
    bytes_sent, unit = sent(ranks, "all-gather", causal=False)
    assert bytes_sent == [2 * (ranks - 1) * unit * 3] * ranks
    bytes_sent, unit = sent(ranks, "all-gather", causal=True)
    assert sum(bytes_sent) == 0.75 * ranks * 2 * (ranks - 1) * unit * 3


@pytest.mark.parametrize(("window", "hops"), [(1, 1), (11, 1), (12, 1), (13, 2), (24, 2), (25, 3)])
def test_window_skips_transfers_outside_it(window, hops):
    way = route(layout("contiguous", 96, 8), Mask(window, 0))
    # rank r's queries see back to the blocks of `hops` ranks before
    assert [sum(part.stop > part.start for part in carried[1:]) for carried in way.carried[: 8 - hops]] == [hops] * (
        8 - hops
    )
    assert way.volume == sum(min(window, 12 * (8 - 1 - owner)) for owner in range(8))
