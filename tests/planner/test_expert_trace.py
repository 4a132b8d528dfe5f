"""The trace of a layer of experts: proved, in order, and with the messages and bytes that the costs count."""

from dataclasses import replace

import pytest

from megatron_cp.experts import FASTERMOE, MEGATRONS, PIPELINED, TOKENS, TWO_HOP, WEIGHTS
from megatron_cp.experts.dispatch_cost import STOCK, DispatchSize, ExpertRanks, dispatch_bytes
from megatron_cp.experts.routed_layer import LayerSize
from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.planner.expert_trace import prove_experts, record_experts

RANKS, PER_NODE = 8, 4
SIZE = LayerSize(experts=8, rows=64 * 8, hidden=16, ffn=8)
TWO = STOCK._replace(comm_type=TWO_HOP, per_node=PER_NODE)
# messages of each step inside the node and to others: rows and probabilities there, rows home, and the other way round
WAYS = {
    "flat": (STOCK, [("there", 6, 8), ("home", 3, 4), ("there", 3, 4), ("home", 6, 8)]),
    "groups of a node": (
        STOCK._replace(comm_type=FASTERMOE, group=4),
        # both leave before one goes home; a step has messages to its own group alone
        [
            *[("there", 6, 0), ("there", 0, 8), ("home", 3, 0), ("home", 0, 4)],
            *[("there", 3, 0), ("there", 0, 4), ("home", 6, 0), ("home", 0, 8)],
        ],
    ),
    "two hops": (TWO, [("there", 6, 2), ("home", 3, 1), ("there", 3, 1), ("home", 6, 2)]),
}


@pytest.mark.parametrize(
    ("exchange", "per_node", "pieces", "group"),
    [
        (MEGATRONS, None, 1, None),
        (TWO_HOP, 2, 3, None),
        (PIPELINED, None, 3, None),
        (FASTERMOE, None, 3, None),
        (FASTERMOE, None, 1, 1),
        (FASTERMOE, None, 1, 2),
        (FASTERMOE, None, 1, 4),
    ],
)
def test_ranks_give_what_one_with_all_experts_gives(exchange, per_node, pieces, group):
    way = STOCK._replace(comm_type=exchange, per_node=per_node, pieces=pieces, group=group)
    assert prove_experts(LayerSize(4, 0, 0, 0, skew=1.0), way, ExpertRanks(4), per_node) < 1e-12


@pytest.mark.parametrize("name", WAYS)
def test_a_rank_sends_what_the_costs_count(name):
    way, messages = WAYS[name]
    cluster = replace(load_cluster("dgx-h100-ib"), ranks_per_node=PER_NODE)
    trace = record_experts(SIZE, way, ExpertRanks(RANKS), PER_NODE, "float32")
    # probabilities are as wide as the costs take them to be
    counted = dispatch_bytes(
        way, DispatchSize(0, SIZE.rows, 4 * SIZE.hidden, SIZE.experts), ExpertRanks(RANKS), cluster
    )
    for rank, legs in enumerate(trace.legs):
        steps = [leg for run in legs for leg in run]
        assert [(leg.what, leg.inside[0], leg.between[0]) for leg in steps if not leg.flops] == messages
        assert [sum(getattr(leg, level)[1] for leg in steps) for level in counted._fields] == pytest.approx(counted)
        assert sum(counted) == pytest.approx(sum(run.sent[rank] for run in trace[:2]))


def test_pieces_leave_before_the_one_before_them_is_computed():
    trace = record_experts(SIZE, STOCK._replace(pieces=3), ExpertRanks(2), 2, "bfloat16")
    order = [("there", 0), ("there", 1), ("experts", 0), ("home", 0), ("there", 2), ("experts", 1), ("home", 1)]
    order += [("experts", 2), ("home", 2)]
    for run in (run for of_rank in trace.legs for run in of_rank):
        assert [(leg.what, leg.piece) for leg in run] == order
    # 3 products of h f for each row forward, and twice as many backward
    done = [sum(leg.flops for leg in run) for run in trace.legs[0]]
    assert done == [2 * 3 * SIZE.rows * SIZE.hidden * SIZE.ffn, 4 * 3 * SIZE.rows * SIZE.hidden * SIZE.ffn]


@pytest.mark.parametrize(("gather", "pieces"), [(TOKENS, 1), (TOKENS, 2), (WEIGHTS, 1), (WEIGHTS, 2)])
def test_ranks_that_share_each_expert_send_what_the_costs_count(gather, pieces):
    way, ranks = STOCK._replace(gather=gather, pieces=pieces), ExpertRanks(4, 2)
    assert prove_experts(LayerSize(4, 0, 0, 0, skew=1.0), way, ranks) < 1e-12
    cluster = replace(load_cluster("dgx-h100-ib"), ranks_per_node=PER_NODE)
    trace = record_experts(SIZE, way, ranks, PER_NODE, "float32")
    size = DispatchSize(0, SIZE.rows, 4 * SIZE.hidden, SIZE.experts, 4 * 3 * SIZE.hidden * SIZE.ffn)
    counted = dispatch_bytes(way, size, ranks, cluster)
    # rows are gathered and outputs scattered for each piece, and their gradients the other way round
    times = 2 * pieces if gather == TOKENS else 1
    for rank, legs in enumerate(trace.legs):
        steps = [leg for run in legs for leg in run]
        kinds = [leg.what for leg in steps]
        assert (kinds.count("gather"), kinds.count("scatter")) == (times, times)
        assert [sum(getattr(leg, level)[1] for leg in steps) for level in counted._fields] == pytest.approx(counted)
        assert sum(counted) == pytest.approx(sum(run.sent[rank] for run in trace[:2]))
