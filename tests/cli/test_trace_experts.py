"""`trace-experts` and the exchanges of `bench experts`: what they print and refuse."""

import json

import pytest
import torch
from typer.testing import CliRunner

from megatron_cp.bench.exchanges import measure
from megatron_cp.cli import app
from megatron_cp.cli.bench_experts import ways_of
from megatron_cp.cli.trace_experts import rate_of
from megatron_cp.comm import in_process
from megatron_cp.experts.dispatch_cost import STOCK, ExpertRanks
from megatron_cp.experts.routed_layer import LayerSize
from megatron_cp.hardware.cluster_file import load_cluster

WORDS = ("--ranks", "4", "--experts", "8", "--rows", "64", "--hidden", "16", "--ffn", "8")


def run(*words):
    return CliRunner().invoke(app, words, catch_exceptions=True)


def test_a_trace_says_what_each_step_sends_and_computes():
    words = ("trace-experts", *WORDS, "--moe-comm-type", "2dh", "--moe-ranks-per-node", "2", "--moe-pieces", "2")
    told = " ".join(run(*words).stdout.split())
    assert told.startswith("proved: largest relative error ")
    assert "forward of rank 0: two-hop in 2 pieces, 8 experts on 4 ranks of dgx-h100-ib" in told
    found = json.loads(run(*words, "--json").stdout)
    assert (found["exchange"], found["ranks_per_node"]) == ("two-hop in 2 pieces", 2)
    first = found["forward"]["ranks"][3][0]
    # all four ranks are on one node of the cluster: two hops of rows and of probabilities, half of 32 rows in each
    assert first == {
        "step": "there",
        "piece": 0,
        "inside": {"messages": 4, "bytes": 2 * 16 * (2 * 16 + 2)},
        "between": {"messages": 0, "bytes": 0},
        "flops": 0,
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("trace-experts", *WORDS, "--experts", "6"), "--experts must be a multiple of --ranks 4, got 6"),
        (("trace-experts", *WORDS, "--rank", "4"), "--rank must be below --ranks 4, got 4"),
        (("trace-experts", *WORDS, "--moe-ranks-per-node", "2"), "add --moe-comm-type two-hop"),
        (("trace-experts", *WORDS, "--moe-group-ranks", "2"), "is of --moe-comm-type fastermoe without --moe-pieces"),
        (
            ("trace-experts", *WORDS, "--moe-comm-type", "fastermoe", "--moe-group-ranks", "3"),
            "must divide the 4 ranks",
        ),
        (("bench", "experts", "--moe-pieces", "2"), "pass --ranks 2"),
        (("bench", "experts", "--moe-group-ranks", "2"), "pass --ranks 2"),
        (("bench", "experts", "--ranks", "4", "--moe-group-ranks", "3"), "must divide the 4 ranks"),
        (("bench", "experts", "--ranks", "3"), "--experts must be a multiple of --ranks 3, got 64"),
    ],
)
def test_bad_sizes_are_refused(words, message):
    assert message in str(run(*words).exception)


@pytest.mark.parametrize(
    ("gather", "rows", "shared", "least"),
    [("tokens", 2048, 2, 256), ("weights", 512, 2, 256), ("tokens", 512, 1, 256)],
    ids=["half of the columns", "own rows", "alone"],
)
def test_products_are_of_the_rows_and_the_width_that_a_rank_has(gather, rows, shared, least):
    size, cluster = LayerSize(8, rows, 4096, 512), load_cluster("dgx-h100-ib")
    found = rate_of(size, STOCK._replace(gather=gather), ExpertRanks(4, shared), cluster)
    assert found == cluster.gemm("bfloat16").rate(least) < cluster.gemm("bfloat16").rate(2 * least)


def test_exchanges_are_timed_in_turns_and_compared():
    size = LayerSize(experts=4, rows=24, hidden=4, ffn=6, skew=1.0)
    ways = ways_of(4, 4, 2, "2", "1,2")
    for found in in_process(4, lambda fabric: measure(fabric, torch.device("cpu"), size, ways, 1), 2):
        whole, *others = [each.engine for each in found]
        assert (whole, *others[:3]) == ("alltoall", "two-hop", "alltoall in 2 pieces", "two-hop in 2 pieces")
        assert others[3:] == ["fastermoe in groups of 1 rank", "fastermoe in groups of 2 ranks"]
        assert all(len(each.seconds) == 1 for each in found)
