"""A ring both ways: no directed link carries more than half of what a ring with one direction sends over it."""

from collections import Counter

import pytest

from megatron_cp.comm import in_process
from megatron_cp.context.algorithms.bidirectional import up_and_down
from megatron_cp.context.layouts import layout
from megatron_cp.context.masks import CAUSAL, FULL
from megatron_cp.context.plan import plan, task_for
from megatron_cp.context.trace.events import Problem
from megatron_cp.context.trace.record import record
from tests.context.dense import problem
from tests.context.test_backends import sharded

RANKS = [3, 4, 5, 6, 8]
BYTES = 8


def count_links(fabric):
    """Count the bytes to each rank from here on."""
    to, exchange = Counter(), fabric.exchange

    def counting(sends, recvs):
        for tensor, peer in sends:
            to[peer] += tensor.numel() * tensor.element_size()
        return exchange(sends, recvs)

    fabric.exchange = counting
    return to


def links(ranks, causal):
    """Per rank the bytes to each other rank, of the forward pass and of both, and the size of a rank's K."""
    task = problem(12 * ranks, 8, 2, causal=causal)

    def body(fabric):
        to = count_links(fabric)
        mine = slice(12 * fabric.rank, 12 * fabric.rank + 12)
        q, k, v, dout = (x[mine] for x in task[:4])
        made = plan("bidirectional", cp=fabric, causal=causal, kernel="reference")
        inside = task_for(q, k, v, made)
        _, saved = made.loop.forward(q, k, v, inside)
        forward = Counter(to)
        made.loop.backward(dout, saved, inside)
        return forward, to - forward

    return in_process(ranks, body), task.k.numel() // ranks * BYTES


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("ranks", RANKS)
def test_no_link_carries_more_than_half_of_a_ring(ranks, causal):
    passes, unit = links(ranks, causal)
    for rank, (forward, backward) in enumerate(passes):
        assert set(forward) <= {(rank + 1) % ranks, (rank - 1) % ranks}
        assert forward[(rank + 1) % ranks] == (ranks - 1) * unit
        # every late half of the ranks from this one on goes by, down to rank 0
        late = ranks - rank if causal and rank else 0 if causal else ranks - 1
        assert forward[(rank - 1) % ranks] == late * unit <= (ranks - 1) * unit
        # Ring Attention carries K, V and their gradients
        assert max(backward.values()) <= 4 * (ranks - 1) * unit / 2


@pytest.mark.parametrize("ranks", [2, *RANKS])
def test_all_links_together_carry_what_zigzag_does(ranks):
    def sent(backend, causal):
        task = problem(12 * ranks, 8, 2, causal=causal)
        return sum(in_process(ranks, lambda fabric: [sharded(fabric, task, backend), fabric.sent][1]))

    for causal in (True, False):
        assert sent("bidirectional", causal) == sent("zigzag", causal)


@pytest.mark.parametrize("ranks", [2, 3, 8, 64])
def test_late_halves_stop_at_the_first_rank(ranks):
    up, down = up_and_down(layout("zigzag", 4 * ranks, ranks), CAUSAL)
    for owner in range(ranks):
        assert [part.stop - part.start for part in up.carried[owner][1:]] == [2] * (ranks - 1)
        assert [part.stop - part.start for part in down.carried[owner][1:]] == [2] * owner + [0] * (ranks - 1 - owner)
    full = up_and_down(layout("zigzag", 4 * ranks, ranks), FULL)
    assert full[0].volume == full[1].volume == 2 * ranks * (ranks - 1)


def test_both_ways_are_one_batch():
    recorded = record(Problem("bidirectional", 4, 64, 4, 4, causal=False))
    posts = [event for event, _ in recorded.forward.steps[0] if type(event).__name__ == "Post"]
    assert [{message.peer for message in post.sends} for post in posts] == [{1, 3}] * 3
