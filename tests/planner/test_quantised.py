"""Quantised messages in the estimate: bytes of both hops, seconds and memory, by hand; the plan counts the same."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from megatron_cp.context.trace.record import record
from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.planner.estimate import Estimate, estimate
from megatron_cp.planner.memory import kinds_of
from megatron_cp.planner.model import model_of
from megatron_cp.planner.of_recipe import parallel_of
from megatron_cp.planner.parallel import Parallel, QuantisedMessages
from megatron_cp.planner.plan_request import FixedSizes, PlanRequest
from megatron_cp.planner.quantised import ParameterKinds, node_hops, sent_in_hops
from megatron_cp.planner.search import search
from megatron_cp.recipe import recipe
from megatron_cp.recipe.file import Unset
from megatron_cp.replicas import QUANTISATIONS
from megatron_cp.replicas.parts import ParameterSpan, parts_of, places_of
from megatron_cp.replicas.two_hops import Sent, sent_to_gather, sent_to_reduce
from tests.planner.test_replicas import MIXTURE

# Llama 3.1 8B on two nodes of 8: TP 2, DP 8, 4 places on 2 nodes
NODES = "--nnodes 2"
APART = "--overlap-grad-reduce=false --overlap-param-gather=false"
GRADIENTS, WEIGHTS = "--zero-quantized-gradients int8", "--zero-quantized-weights"
H100 = load_cluster("dgx-h100-ib")
# of a rank: 32 layers of 218,103,808 parameters in matrices; 65 norms of 4096, and two times 128,256 x 4096
CODED, EXACT = 3_489_660_928, 525_469_696
# 260 bytes for 256 numbers, and float32 or bf16 for the others
OF_GRADIENTS = CODED // 256 * 260 + 4 * EXACT
OF_WEIGHTS = CODED // 256 * 260 + 2 * EXACT


@cache
def estimated(flags: str) -> Estimate:
    run = recipe.load("llama3.1-8b-8k-h100x8", Unset({}), f"{NODES} {flags}".split())
    model = model_of(run)
    return estimate(model, parallel_of(run, model.layers), H100, 8192)


@pytest.mark.parametrize("name", QUANTISATIONS.names)
@pytest.mark.parametrize(("ranks", "per_node"), [(4, 2), (8, 2), (6, 3), (4, 4), (4, 1)])
def test_the_formula_is_what_a_run_sends_of_whole_blocks(name: str, ranks: int, per_node: int) -> None:
    quantisation, elements = QUANTISATIONS.get(name), 512 * ranks
    parts = parts_of([ParameterSpan(0, elements)], elements, ranks)
    places = places_of([rank // per_node for rank in range(ranks)])
    hops = node_hops(Parallel(dp=ranks, global_batch=ranks), replace(H100, ranks_per_node=per_node))
    found = Sent(*map(round, sent_in_hops(quantisation.bytes * elements, hops)))
    for own in range(ranks):
        assert found == sent_to_reduce(parts, places, quantisation, torch.float32, own)
        assert found == sent_to_gather(parts, places, quantisation, torch.bfloat16, own)


def test_parameters_are_sorted_as_a_run_marks_them() -> None:
    run = estimated(WEIGHTS)
    assert kinds_of(run.model, run.parallel, 32, True, True) == ParameterKinds(CODED, EXACT, 0)
    # one layer: attention of 4 x 8 x 8 and a router of 4 x 8, two norms of 8, experts of 4 x 3 x 8 x 16; ends of 32 x 8
    exact = 4 * 8 + 2 * 8 + 2 * 32 * 8 + 8
    alone, shared = (kinds_of(MIXTURE, Parallel(dp=2, ep=ep, global_batch=2), 1, True, True) for ep in (1, 2))
    assert alone == ParameterKinds(4 * 8 * 8 + 4 * 3 * 8 * 16, exact, 0)
    assert shared == ParameterKinds(4 * 8 * 8, exact, 2 * 3 * 8 * 16)


def test_bytes_of_both_hops() -> None:
    both = estimated(f"{GRADIENTS} {WEIGHTS}").traffic
    # three of four ranks of a node; one part in eight goes to the other node
    assert both.inside.data == pytest.approx(7_680_893_952) == 3 / 4 * (OF_GRADIENTS + OF_WEIGHTS)
    assert both.between.data == pytest.approx(1_280_148_992) == (OF_GRADIENTS + OF_WEIGHTS) / 8
    # weights of 2 bytes in a ring, one of whose four hops on a node leaves it
    gradients = estimated(GRADIENTS).traffic.between.data
    assert gradients == pytest.approx(2_462_377_856) == OF_GRADIENTS / 8 + 2 * (CODED + EXACT) * 7 / 8 / 4
    plain = estimated("").traffic.between.data
    assert plain == pytest.approx(5_269_858_944) == 6 * (CODED + EXACT) * 7 / 8 / 4


@pytest.mark.parametrize(
    ("ranks", "inside", "between"),
    [
        # two ranks of a node; of the others at their place one is on the same machine and two are not
        (4, 1 / 2 + 1 / 8, 2 / 8),
        # six data-parallel ranks and two: one hop between all eight
        (12, 3 / 8, 4 / 8),
        # all are on one
        (16, 3 / 8, 4 / 8),
    ],
)
def test_nodes_that_are_said_are_sent_over(ranks: int, inside: float, between: float) -> None:
    size = OF_GRADIENTS + OF_WEIGHTS
    sent = estimated(f"{GRADIENTS} {WEIGHTS} --zero-quantized-ranks-per-node {ranks}").traffic
    assert (sent.inside.data, sent.between.data) == pytest.approx((inside * size, between * size))


def test_seconds_of_messages_and_of_passes_over_memory() -> None:
    found = estimated(f"{GRADIENTS} {WEIGHTS} {APART}")
    # a number's float32 copy and codes, read and written; sums of a quarter, and in the second hop of an eighth
    reduced = 4 + 12 + (2 * 260 / 256 + 2) + (2 * 260 / 256 + 4) / 4
    gathered = 260 / 256 + 12 + 2
    passes = (CODED + EXACT) * (reduced + gathered) / H100.touch_bytes_per_s
    near, far = H100.inside, H100.between
    assert far is not None
    latencies = 2 * (2 * near.least_s + far.least_s)
    sent = (OF_GRADIENTS + OF_WEIGHTS) * (3 / 4 / near.bytes_per_s + 1 / 8 / far.bytes_per_s)
    assert found.parts.data == pytest.approx(passes + latencies + sent)
    assert estimated(f"{GRADIENTS} {WEIGHTS}").parts.data < found.parts.data


def test_memory_of_what_is_left_over_and_of_a_bucket() -> None:
    plain, int8, int4 = (estimated(flags).worst_memory for flags in ("", GRADIENTS, GRADIENTS.replace("int8", "int4")))
    assert int8.gradients == plain.gradients
    # 2 bytes for each number of the buffer, and for each of those that a place adds up
    assert int4.gradients - plain.gradients == pytest.approx(8_724_152_320) == 2 * CODED * (1 + 1 / 4)
    assert int8.buffers - plain.buffers == pytest.approx(8 * 40_000_000)
    # all in one bucket, when the activations are gone
    whole = estimated(f"{GRADIENTS} {APART}").worst_memory
    assert whole.buffers == max(plain.buffers, 8 * (CODED + EXACT) - plain.activations - plain.logits)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            f"{GRADIENTS} --use-distributed-optimizer=false",
            "one instance of the distributed optimizer; pass --use-dist",
        ),
        (f"{WEIGHTS} --use-megatron-fsdp", "without FSDP"),
        (f"{GRADIENTS} --num-distributed-optimizer-instances 2", "without FSDP and --num-distributed"),
        (f"{WEIGHTS} --pipeline-model-parallel-size 2 --pp-schedule chimera", "take another --pp-schedule"),
        ("--zero-quantized-gradients int9", "unknown quantisation 'int9'"),
        (f"{GRADIENTS} --zero-quantized-ranks-per-node 0", "--zero-quantized-ranks-per-node takes a positive int"),
    ],
)
def test_what_training_refuses_has_no_estimate(flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimated(flags)


def test_weights_in_float32_have_none_beside_them() -> None:
    run = estimated(WEIGHTS)
    with pytest.raises(ValueError, match="pass --bf16"):
        estimate(run.model, replace(run.parallel, precision="float32"), H100, 8192)


def test_a_plan_counts_the_same_bytes_and_leaves_out_what_has_none_to_send() -> None:
    request = PlanRequest(
        model=estimated("").model,
        seq=8192,
        gpus=16,
        cluster=H100,
        global_batch=128,
        messages=QuantisedMessages("int8", weights=True),
        fixed=FixedSizes(tp=2, cp=1, pp=1, dp=8, micro_batch=1),
    )
    best = search(request, record, 1).best
    assert sum(level.data for level in best.traffic) == pytest.approx(7 / 8 * (OF_GRADIENTS + OF_WEIGHTS))
    with pytest.raises(ValueError, match="DP or CP for quantised messages"):
        search(replace(request, gpus=2, fixed=FixedSizes(tp=2)), record, 1)
