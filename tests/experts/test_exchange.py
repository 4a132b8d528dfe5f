"""An exchange in two hops is the exchange in one, bit for bit, with fewer messages between nodes."""

import random
from typing import NamedTuple

import pytest
import torch

from megatron_cp.comm import SingleFabric, in_process
from megatron_cp.experts import EXCHANGES, TWO_HOP
from megatron_cp.experts.dispatch_cost import exchange_bytes
from megatron_cp.experts.exchange import TwoHopExchange, sent_home, sent_there
from megatron_cp.experts.nodes import ranks_of_a_node

HIDDEN = 3
# ranks on each node
NODES = [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (6, 3), (8, 2), (8, 4), (8, 8)]


class Noted:
    """A fabric that notes the rows that it sends to each rank, numbered in the whole group."""

    def __init__(self, fabric, ranks, notes):
        self._fabric, self._ranks, self._notes = fabric, ranks, notes
        self.rank, self.size = fabric.rank, fabric.size

    def all_to_all(self, rows, sends, recvs):
        others = zip(self._ranks, sends, strict=True)
        self._notes += [(rank, count) for rank, count in others if rank != self._ranks[self.rank] and count]
        return self._fabric.all_to_all(rows, sends, recvs)


def counts_of(ranks, seed, full=False):
    """Rows of each rank for each rank; many are 0 unless all are asked for."""
    draw = random.Random(seed)
    return [[draw.randint(1, 5) if full else max(0, draw.randint(-3, 5)) for _ in range(ranks)] for _ in range(ranks)]


def two_hops(fabric, per_node, notes):
    first = fabric.rank // per_node * per_node
    groups = [range(first, first + per_node), range(fabric.rank % per_node, fabric.size, per_node)]
    return TwoHopExchange(
        *(
            Noted(SingleFabric() if len(group) == 1 else fabric.subset(list(group)), list(group), notes)
            for group in groups
        )
    )


class Sent(NamedTuple):
    """What one rank gets and sends, with gradients, by both exchanges; notes of one exchange there and of one home."""

    flat: list
    hops: list
    there: list
    home: list
    calls: int


def exchanged(fabric, counts, per_node):
    me, notes = fabric.rank, []
    arriving = [row[me] for row in counts]
    exchange = two_hops(fabric, per_node, notes)
    first = me - me % per_node
    plan = exchange.plan(counts[first : first + per_node], arriving)
    draw = torch.Generator().manual_seed(me)
    rows = torch.randn(sum(counts[me]), HIDDEN, generator=draw).requires_grad_()
    scale = torch.randn(sum(arriving), HIDDEN, generator=draw)
    gradient = torch.randn(sum(counts[me]), HIDDEN, generator=draw)
    there = sent_there(exchange, plan, rows)
    forward = notes.copy()
    notes.clear()
    home = sent_home(exchange, plan, there * scale)
    back = notes.copy()
    home.backward(gradient)
    arrived = fabric.all_to_all(rows.detach(), counts[me], arriving)
    returned = fabric.all_to_all(arrived * scale, arriving, counts[me])
    of_arrived = fabric.all_to_all(gradient, counts[me], arriving) * scale
    flat = [arrived, returned, fabric.all_to_all(of_arrived, arriving, counts[me])]
    return Sent(flat, [there.detach(), home.detach(), rows.grad], forward, back, exchange.calls)


@pytest.mark.parametrize("full", [False, True], ids=["some for some", "some for all"])
@pytest.mark.parametrize(("ranks", "per_node"), NODES, ids=[f"{ranks} by {per_node}" for ranks, per_node in NODES])
def test_two_hops_are_one_bit_for_bit_forward_and_backward(ranks, per_node, full):
    counts = counts_of(ranks, ranks * per_node, full)
    for sent in in_process(ranks, lambda fabric: exchanged(fabric, counts, per_node), per_node):
        for found, expected in zip(sent.hops, sent.flat, strict=True):
            assert torch.equal(found, expected)
        # there and home, forward and backward
        assert sent.calls == 4


def test_a_rank_without_rows_for_anyone_takes_part():
    counts = counts_of(4, 0)
    counts[1], counts = [0] * 4, [[*row[:2], 0, row[3]] for row in counts]
    for sent in in_process(4, lambda fabric: exchanged(fabric, counts, 2), 2):
        assert all(torch.equal(found, expected) for found, expected in zip(sent.hops, sent.flat, strict=True))


@pytest.mark.parametrize(("ranks", "per_node"), [(4, 2), (8, 2), (8, 4)])
def test_messages_between_nodes_fall_by_the_ranks_of_a_node_and_rows_between_them_stay(ranks, per_node):
    counts = counts_of(ranks, 1, full=True)
    found = in_process(ranks, lambda fabric: exchanged(fabric, counts, per_node), per_node)
    nodes = ranks // per_node
    for me, sent in enumerate(found):
        node, place = divmod(me, per_node)
        between = [(rank, rows) for rank, rows in sent.there if rank // per_node != node]
        inside = [(rank, rows) for rank, rows in sent.there if rank // per_node == node]
        # in one hop (nodes - 1) * per_node
        assert (len(between), len(inside)) == (nodes - 1, per_node - 1)
        # one from each rank of the node to this rank's like
        for rank, rows in between:
            assert rank % per_node == place
            assert rows == sum(counts[node * per_node + at][rank] for at in range(per_node))
        for rank, rows in inside:
            assert rows == sum(counts[me][rank % per_node :: per_node])
        assert len([rank for rank, _ in sent.home if rank // per_node != node]) == nodes - 1
    everywhere = sum(
        rows for me, sent in enumerate(found) for rank, rows in sent.there if rank // per_node != me // per_node
    )
    assert everywhere == sum(
        counts[src][dst] for src in range(ranks) for dst in range(ranks) if src // per_node != dst // per_node
    )


def test_the_estimate_counts_the_rows_of_an_even_load():
    found = in_process(8, lambda fabric: exchanged(fabric, [[3] * 8] * 8, 4), 4)
    expected = exchange_bytes(3 * 8, 8, 4, two_hops=True)
    for me, sent in enumerate(found):
        for notes in (sent.there, sent.home):
            inside = sum(rows for rank, rows in notes if rank // 4 == me // 4)
            assert (inside, sum(rows for _, rows in notes) - inside) == expected


def test_nodes_with_different_numbers_of_ranks_are_refused():
    assert [ranks_of_a_node(nodes) for nodes in ([0, 0, 1, 1], [0, 1], [3, 3, 3])] == [2, 1, 3]
    with pytest.raises(ValueError, match=r"on each node, got 1 and 3; change --expert-model-parallel-size"):
        ranks_of_a_node([0, 0, 0, 1])


def test_the_entry_has_the_name_of_its_exchange():
    assert EXCHANGES.get("2dh").name == TWO_HOP == TwoHopExchange.name
