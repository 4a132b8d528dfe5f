"""The cost of tokens' ways to experts and back, with the figures of a cluster that is easy to reckon with."""

from dataclasses import replace

import pytest

from megatron_cp.experts import FASTERMOE, TOKENS, TWO_HOP, WEIGHTS
from megatron_cp.experts.degree import MixtureSize, weighed, weighed_at_all
from megatron_cp.experts.dispatch_cost import (
    STOCK,
    Dispatch,
    DispatchSize,
    ExpertRanks,
    PassSeconds,
    SentBytes,
    calls_of,
    dispatch_bytes,
    dispatch_seconds,
    exchange_bytes,
    exchange_seconds,
    loop_seconds,
    per_node_of,
)
from megatron_cp.experts.pieces import in_turn
from megatron_cp.hardware.cluster import Cluster, Link
from megatron_cp.hardware.cluster_file import load_cluster

# nodes of four: 100 bytes/s and 1 s inside, 10 bytes/s and 3 s between; copies read and write 400 bytes/s
CLUSTER = Cluster(
    name="reckoned",
    dtype="bfloat16",
    flops_forward=1.0,
    flops_backward=1.0,
    call_s=0.0,
    touch_bytes_per_s=400.0,
    host_bytes_per_s=1.0,
    ranks_per_node=4,
    inside=Link(bytes_per_s=100.0, latency_s=1.0, ports="shared"),
    between=Link(bytes_per_s=10.0, latency_s=3.0, ports="shared"),
)
TWO = STOCK._replace(comm_type=TWO_HOP)
GROUPS = STOCK._replace(comm_type=FASTERMOE)
GATHERING = STOCK._replace(dispatcher="allgather")
NOTHING = PassSeconds(0.0, 0.0)
# a rank's 10 tokens of 10 bytes, each for two of 4 experts
SIZE = DispatchSize(tokens=10, rows=20, row_bytes=10, experts=4)


def counted(ranks, per_node, *, two_hops):
    """Rows that rank 0 sends inside its node and to others where every rank has one row for each rank."""
    near = [to for to in range(ranks) if to // per_node == 0 and to != 0]
    far = [to for to in range(ranks) if to // per_node != 0]
    if not two_hops:
        return len(near), len(far)
    # a row goes to the rank of this node at its destination's place, which sends those of the whole node on
    first = [to for to in range(ranks) if to % per_node != 0]
    second = [(by, to) for by in range(per_node) for to in range(ranks) if to % per_node == 0 and to // per_node != 0]
    return len(first), len(second)


@pytest.mark.parametrize(("ranks", "per_node"), [(1, 1), (4, 4), (8, 4), (12, 4), (4, 1)])
@pytest.mark.parametrize("two_hops", [False, True])
def test_bytes_are_the_rows_that_are_sent(ranks, per_node, two_hops):
    found = exchange_bytes(10.0 * ranks, ranks, per_node, two_hops=two_hops)
    assert found == pytest.approx(tuple(10 * rows for rows in counted(ranks, per_node, two_hops=two_hops)))


def test_one_hop_is_a_pairwise_exchange_on_both_levels_at_once():
    # 10 bytes for each of 8 ranks: 3 messages and 30 bytes inside, 4 messages and 40 bytes between
    assert exchange_seconds(80, ExpertRanks(8), STOCK, CLUSTER) == pytest.approx(max(3 * 1 + 0.3, 4 * 3 + 4))
    # every other rank: two on a node
    assert exchange_seconds(80, ExpertRanks(4, 2), STOCK, CLUSTER) == pytest.approx(max(1 + 0.2, 2 * 3 + 4))


def test_two_hops_send_one_message_to_each_node_after_the_way_inside():
    # 60 bytes inside, as a neighbour passes 3/4 on; one message of 40 bytes between; 80 bytes copied twice
    copied = 2 * 2 * 80 / 400
    assert exchange_seconds(80, ExpertRanks(8), TWO, CLUSTER) == pytest.approx(3 * 1 + 0.6 + 3 + 4 + copied)
    # nodes of two, as the flag has them: 40 bytes to one neighbour, 60 in three messages
    pairs = TWO._replace(per_node=2)
    assert exchange_seconds(80, ExpertRanks(8), pairs, CLUSTER) == pytest.approx(1 + 0.4 + 3 * 3 + 6 + copied)


# the last: three ranks of a node, which are said to be three nodes
@pytest.mark.parametrize(
    ("ranks", "per_node"), [(ExpertRanks(4), None), (ExpertRanks(2, 4), None), (ExpertRanks(3), 1)]
)
def test_two_hops_are_one_on_one_node_and_with_one_rank_on_each(ranks, per_node):
    one, two = (exchange_seconds(60, ranks, each._replace(per_node=per_node), CLUSTER) for each in (STOCK, TWO))
    assert two == pytest.approx(one)


def test_two_hops_refuse_what_training_refuses():
    assert per_node_of(STOCK, ExpertRanks(6), CLUSTER) == 4
    with pytest.raises(ValueError, match="needs as many of the ranks that share a layer's experts on each node"):
        per_node_of(TWO, ExpertRanks(6), CLUSTER)


def test_pieces_take_as_long_as_their_order_says():
    # there 0 and 1 end at 1 and 2, experts 0 at 4, back 0 at 6, experts 1 at 7, back 1 at 9
    assert loop_seconds([1] * 2, 3, [2] * 2, beside=True) == 9
    # back 0 at 3, there 2 at 4, back 1 at 5, experts 2 at 5, back 2 at 6
    assert loop_seconds([1] * 3, 1, [1] * 3, beside=True) == 6
    assert loop_seconds([1], 3, [2], beside=True) == 6
    assert loop_seconds([1] * 2, 3, [2] * 2, beside=False) == 12


class _Arrival:
    """Rows that are there at a time."""

    def __init__(self, at):
        self.at = at

    def landed(self):
        return self.at


def played(pieces, there, compute, back, ahead):
    """When the last piece is back by the loop that training runs, with a clock for messages and one for experts."""
    messages = experts = 0.0

    def leaves(_):
        nonlocal messages
        messages += there
        return _Arrival(messages)

    def computes(_, arrived):
        nonlocal experts
        experts = max(experts, arrived) + compute
        return experts

    def returns(_, done):
        nonlocal messages
        messages = max(messages, done) + back
        return _Arrival(messages)

    return in_turn(pieces, leaves, computes, returns, ahead)[-1]


@pytest.mark.parametrize("pieces", [1, 2, 3, 5])
@pytest.mark.parametrize("times", [(1, 3, 2), (3, 1, 2), (2, 2, 2), (0, 1, 0)])
def test_pieces_are_reckoned_in_the_order_of_training(pieces, times):
    there, compute, back = times
    for ahead in (1, None):
        found = loop_seconds([there] * pieces, compute, [back] * pieces, beside=True, ahead=ahead)
        assert found == played(pieces, *times, ahead)


def test_a_microbatch_by_each_of_megatrons_dispatchers():
    ranks, experts = ExpertRanks(2), PassSeconds(5.0, 10.0)
    # 200 bytes of states and 80 of probabilities, half of them to the other rank; 2 * 4 counts of 8 bytes
    states, chances, counts = 1 + 1.0, 1 + 0.4, 1 + 0.32
    found = dispatch_seconds(STOCK, SIZE, ranks, CLUSTER, experts)
    assert found == pytest.approx((states + chances + states + counts, states + states + chances))
    # all 20 tokens' states, float32 probabilities and marks of 4 experts each: 200, 320 and 80 bytes
    states, chances, marks = 1 + 1.0, 1 + 1.6, 1 + 0.4
    found = dispatch_seconds(GATHERING, SIZE, ranks, CLUSTER, experts)
    assert found == pytest.approx((states + chances + marks + states, states + states + chances))


def test_bytes_of_a_microbatch_by_each_of_megatrons_dispatchers():
    # 20 rows of 10 bytes there and back in both passes, and a probability and its gradient: half of 20 * (40 + 8)
    assert dispatch_bytes(STOCK, SIZE, ExpertRanks(2), CLUSTER) == pytest.approx((480, 0))
    # 10 tokens to one other rank, with 4 probabilities, their gradients and a mark each: 10 * (40 + 4 * 9)
    assert dispatch_bytes(GATHERING, SIZE, ExpertRanks(2), CLUSTER) == pytest.approx((760, 0))
    # two ranks that share each expert have each other's rows too
    assert dispatch_bytes(STOCK, SIZE, ExpertRanks(2, 2), CLUSTER) == pytest.approx((480 + 960, 0))
    # of a ring over two nodes of four one hop in four leaves the node
    assert dispatch_bytes(GATHERING, SIZE, ExpertRanks(8), CLUSTER) == pytest.approx((7 * 760 * 3 / 4, 7 * 760 / 4))
    assert SentBytes(1, 2).plus(SentBytes(3, 4), 2) == SentBytes(7, 10)


def test_ranks_that_share_each_expert_gather_rows_and_add_up_outputs():
    experts = PassSeconds(0.0, 0.0)
    alone, shared = (
        dispatch_seconds(STOCK, SIZE, ranks, CLUSTER, experts) for ranks in (ExpertRanks(1), ExpertRanks(1, 2))
    )
    assert alone == (0, 0)
    # 400 bytes of states and 160 of probabilities, half of them sent, forward and backward; counts as above
    states, chances, counts = 1 + 2.0, 1 + 0.8, 1 + 0.32
    assert shared == pytest.approx((2 * states + chances + counts, 2 * states + chances))


def test_experts_hide_messages_of_other_pieces_on_a_gpu_alone():
    ranks, experts = ExpertRanks(8), PassSeconds(1000.0, 2000.0)
    whole, pieces, two = (
        dispatch_seconds(each, SIZE, ranks, CLUSTER, experts)
        for each in (STOCK, STOCK._replace(pieces=4), TWO._replace(pieces=4))
    )
    assert pieces.backward < whole.backward
    # experts take so long that one way there and one back remain, of a quarter of the rows each
    quarter = [exchange_seconds(size / 4, ranks, STOCK, CLUSTER) for size in (200, 80)]
    assert pieces.backward == pytest.approx(2 * quarter[0] + quarter[1])
    assert two.backward < pieces.backward
    # in forward each piece gathers its counts: 7/8 of 8 * 4 * 8 bytes, on four ports of a node, in 3 rounds
    counts = 256 * 7 / 8 / (4 * 10) + 3 * 3
    assert pieces.forward == pytest.approx(pieces.backward + 4 * counts)
    host = replace(CLUSTER, host_bytes_per_s=None)
    waiting = dispatch_seconds(STOCK._replace(pieces=4), SIZE, ranks, host, experts)
    assert waiting.backward == pytest.approx(4 * pieces.backward)
    assert waiting.total > whole.total


def test_groups_of_ranks_get_their_messages_one_after_the_other():
    ranks, experts = ExpertRanks(8), PassSeconds(0.0, 0.0)
    # of 200 bytes of states 25 go to each rank, and 10 of probabilities: to 3 of this node, then to 4 of the other
    near, far = (1 + 25 / 100, 1 + 10 / 100), (3 + 25 / 10, 3 + 10 / 10)
    states, chances = (3 * one + 4 * other for one, other in zip(near, far, strict=True))
    counts = 256 * 7 / 8 / (4 * 10) + 3 * 3
    for group, calls in ((None, 2), (4, 2), (2, 4), (8, 1)):
        way = GROUPS._replace(group=group)
        found = dispatch_seconds(way, SIZE, ranks, CLUSTER, experts)
        assert calls_of(way, ranks, CLUSTER) == calls
        if calls > 1:
            assert found == pytest.approx((2 * states + chances + counts, 2 * states + chances))
        else:
            # one group is one exchange
            assert found == pytest.approx(dispatch_seconds(STOCK, SIZE, ranks, CLUSTER, experts))
    # on one node each rank is a group
    assert calls_of(GROUPS, ExpertRanks(4), CLUSTER) == 4
    assert dispatch_bytes(GROUPS, SIZE, ranks, CLUSTER) == dispatch_bytes(STOCK, SIZE, ranks, CLUSTER)
    with pytest.raises(ValueError, match="--moe-group-ranks must divide the 8 ranks"):
        dispatch_seconds(GROUPS._replace(group=3), SIZE, ranks, CLUSTER, experts)


def test_experts_of_one_group_hide_the_messages_of_the_next():
    ranks, experts = ExpertRanks(8), PassSeconds(1000.0, 1000.0)
    found = dispatch_seconds(GROUPS, SIZE, ranks, CLUSTER, experts)
    # those inside the node come before, and those of the other node go home after
    assert found.backward == pytest.approx(3 * (1 + 25 / 100) + 4 * (3 + 25 / 10) + 4 * (3 + 10 / 10))


@pytest.mark.parametrize(
    ("dispatch", "text"),
    [
        (STOCK, "alltoall"),
        (GATHERING, "allgather"),
        (Dispatch(pieces=2), "alltoall in 2 pieces"),
        (Dispatch(comm_type="deepspeed-moe", pieces=4), "two-hop in 4 pieces"),
        (Dispatch(comm_type="fastermoe", pieces=4), "fastermoe in 4 pieces"),
        (GROUPS, "fastermoe in groups of ranks"),
        (GROUPS._replace(group=4), "fastermoe in groups of 4 ranks"),
    ],
)
def test_a_way_is_named(dispatch, text):
    assert str(dispatch) == text


def test_ranks_that_share_experts_gather_tokens_or_weights():
    ranks, size = ExpertRanks(2, 2), SIZE._replace(weights=100.0, times=2)
    tokens, weights = (
        dispatch_bytes(STOCK._replace(gather=gather), size, ranks, CLUSTER) for gather in (TOKENS, WEIGHTS)
    )
    # half of 20 rows of 10 bytes, there and back in both passes, with probabilities and their gradients
    once = 20 * (4 * 10 + 2 * 4)
    # all of them to the other rank that shares the experts, or half of each of two experts, once in two microbatches
    # and gradients in each
    assert (tokens, weights) == (SentBytes(once / 2 + once, 0), SentBytes(once / 2 + 1.5 * 100, 0))
    sent, gathered = (
        dispatch_seconds(STOCK._replace(gather=gather), size, ranks, CLUSTER, NOTHING) for gather in (TOKENS, WEIGHTS)
    )
    alone = dispatch_seconds(STOCK, size, ExpertRanks(2), CLUSTER, NOTHING)
    # a latency, and 100 of 200 bytes to the other rank
    assert gathered.backward - alone.backward == pytest.approx(1 + 1)
    assert sent.total > alone.total


@pytest.mark.parametrize(("tokens", "cheaper"), [(256, TOKENS), (1 << 16, WEIGHTS)])
def test_few_tokens_are_gathered_and_weights_beside_many(tokens, cheaper):
    size = MixtureSize(tokens, 2, 8, 4096, 14336, 3, "bfloat16", split=False)
    ways = [STOCK._replace(gather=gather) for gather in (TOKENS, WEIGHTS)]
    found = weighed(ways, size, ExpertRanks(4, 2), load_cluster("dgx-h100-ib"))
    assert [each.dispatch.gather == cheaper for each in found] == [True, False]


@pytest.mark.parametrize(("dtype", "tensor"), [("bfloat16", 2), ("float16", 1)], ids=["unequal nodes", "no rates"])
def test_where_a_cluster_says_nothing_all_choices_are_left(dtype, tensor):
    # six ranks that share experts, of a node of eight ranks and of the next one
    choices = [STOCK._replace(comm_type=TWO_HOP, gather=gather) for gather in (TOKENS, WEIGHTS)]
    size = MixtureSize(4096, 2, 12, 4096, 14336, 3, dtype, False)
    found = weighed_at_all(choices, size, ExpertRanks(6, tensor), load_cluster("dgx-h100-ib"))
    assert [(each.dispatch, each.seconds) for each in found] == [(way, 0.0) for way in choices]
