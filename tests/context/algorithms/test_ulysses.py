"""Heads in chunks: every head exchanged once, and exchanges beside the attention of the other chunk."""

import pytest

from megatron_cp.context.heads import CHUNKS, cut, share_heads
from megatron_cp.context.trace.events import Compute, Post, Problem, Wait
from megatron_cp.context.trace.record import record
from megatron_cp.grid import Grid

DEALS = [(8, 8, 2), (8, 2, 2), (8, 1, 4), (8, 8, 8), (10, 5, 4), (7, 7, 3), (12, 3, 2), (32, 8, 4)]


def heads(share):
    return [*range(share.start, share.stop)]


@pytest.mark.parametrize("within_group", [True, False])
@pytest.mark.parametrize("sizes", DEALS, ids=str)
def test_every_head_is_in_one_chunk_and_is_sent_once(sizes, within_group):
    shares, group = share_heads(*sizes), sizes[0] // sizes[1]
    chunks = cut(shares, within_group=within_group)
    assert len(chunks) <= CHUNKS
    for rank in range(sizes[2]):
        held = []
        for chunk in chunks:
            held += heads(chunk.arriving[rank])
            assert {head // group for head in heads(chunk.shares.q[rank])} == {*heads(chunk.shares.kv[rank])} <= {*held}
        assert [head for chunk in chunks for head in heads(chunk.shares.q[rank])] == heads(shares.q[rank])
        assert held == [head for chunk in chunks for head in heads(chunk.leaving[rank])] == heads(shares.kv[rank])


@pytest.mark.parametrize(("sizes", "count"), [((8, 8, 2), 2), ((8, 2, 2), 2), ((8, 8, 8), 1), ((7, 7, 4), 1)])
def test_a_hand_of_one_head_is_one_chunk(sizes, count):
    assert len(cut(share_heads(*sizes), within_group=True)) == count


def test_a_single_kv_head_is_not_carried_around_a_ring_twice():
    assert len(cut(share_heads(8, 2, 2), within_group=False)) == 1


def beside_attention(run):
    """Per rank, how many exchanges have a kernel call between their start and the wait for them."""
    found = []
    for steps in run.steps:
        events = [event for event, _ in steps]
        waits = {event.batch: at for at, event in enumerate(events) if isinstance(event, Wait)}
        posts = [(at, waits[event.batch]) for at, event in enumerate(events) if isinstance(event, Post)]
        found.append(sum(any(isinstance(event, Compute) for event in events[a:b]) for a, b in posts))
    return found


@pytest.mark.parametrize(
    ("backend", "kv_heads", "grid"), [("ulysses", 8, None), ("ulysses", 1, None), ("usp", 8, (4, 1))]
)
def test_second_chunk_arrives_and_first_one_leaves_during_attention(backend, kv_heads, grid):
    recorded = record(Problem(backend, 4, 256, 8, kv_heads, grid=grid and Grid(*grid)))
    for run in (recorded.forward, recorded.backward):
        assert beside_attention(run) == [2] * 4
