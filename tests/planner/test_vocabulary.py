"""The estimate of a vocabulary over all ranks of a pipeline, beside figures that are worked out by hand."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_cp.context.trace.record import record
from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.hardware.operations import Product
from megatron_cp.pipeline.offload import Offload
from megatron_cp.planner.estimate import Estimate, estimate
from megatron_cp.planner.model import Transformer, model_of
from megatron_cp.planner.of_recipe import parallel_of
from megatron_cp.planner.parallel import Parallel
from megatron_cp.planner.plan_recipe import as_recipe
from megatron_cp.planner.plan_request import FixedSizes, PlanRequest
from megatron_cp.planner.search import search
from megatron_cp.planner.unmodelled import unmodelled
from megatron_cp.planner.vocabulary import embedding_seconds, end_times, head_times, meeting_times
from megatron_cp.planner.work import RankConfig, layer
from megatron_cp.recipe import recipe
from megatron_cp.recipe.file import Unset

H100 = load_cluster("dgx-h100-ib")
# 4 ranks of one node, a layer each; 16384 / 4 = 4096 rows on each, 2048 x 1024 = 2,097,152 elements of hidden states
UNTIED = Transformer(
    name="wide", layers=4, hidden=1024, ffn=4096, heads=8, kv_heads=8, head_dim=128, vocab=16384, gated=False
)
TIED = replace(UNTIED, tied=True)
WHOLE = Parallel(pp=4, global_batch=8, schedule="1f1b")
SHARED = {barriers: replace(WHOLE, barriers=barriers) for barriers in (1, 2)}
SEQ, WIDE = 2048, 2_097_152


def of(parallel: Parallel, model: Transformer = UNTIED) -> Estimate:
    return estimate(model, parallel, H100, SEQ)


def rank_of(barriers: int) -> RankConfig:
    return RankConfig(model=UNTIED, parallel=SHARED[barriers], cluster=H100, seq=SEQ)


def test_each_rank_has_its_part_of_both_weights() -> None:
    # an embedding has 16384 x 1024 = 16,777,216 parameters; a quarter of two is 8,388,608, of a tied one 4,194,304
    for model, mine in ((UNTIED, 8_388_608), (TIED, 4_194_304)):
        before, after = of(WHOLE, model).memory, of(SHARED[1], model).memory
        for at, had in enumerate((16_777_216, 0, 0, 16_777_216)):
            # bf16 weights, float32 gradients, and float32 weights and moments on one data-parallel rank
            changes = [there - here for here, there in zip(before[at][:3], after[at][:3], strict=True)]
            assert changes == pytest.approx([each * (mine - had) for each in (2, 4, 12)])


@pytest.mark.parametrize("barriers", [1, 2])
def test_one_or_two_more_microbatches_are_in_flight(barriers: int) -> None:
    before, after = of(WHOLE).memory, of(SHARED[barriers]).memory
    one = before[3].activations
    for at in range(4):
        assert before[at].activations == pytest.approx((4 - at) * one)
        assert after[at].activations == pytest.approx((4 - at + barriers) * one)


@pytest.mark.parametrize("barriers", [1, 2])
def test_under_zb_h1_every_rank_keeps_as_many(barriers: int) -> None:
    one = of(WHOLE).memory[3].activations
    for memory in of(replace(SHARED[barriers], schedule="zb-h1")).memory:
        # I frees the inputs of two norms before W does: less than where all wait for W, more than with 1f1b's last rank
        assert (1 + barriers) * one < memory.activations < 1.000001 * (4 + barriers) * one


def test_the_last_stage_of_the_v_is_on_the_first_rank() -> None:
    """Output layer and logits are where the V ends, and with the vocabulary on all ranks messages of the last stage."""
    on_v = replace(WHOLE, schedule="zb-v", pp=2, vp=2)
    first, second = of(on_v).memory
    # twice 16384 x 1024 parameters of 2 bytes there, none here
    assert first.weights - second.weights == pytest.approx(2 * 2 * 16_777_216, rel=1e-3)
    assert (first.logits, second.logits) == (10 * 2048 * 16384, 0.0)
    first, second = of(replace(on_v, barriers=1)).memory
    assert first.weights == pytest.approx(second.weights, rel=1e-3)
    # two parts of 2 ranks and of its own, and four tensors of float32, instead of two parts of two microbatches
    assert first.buffers - second.buffers == pytest.approx((2 * 3 * 2 + 16 - 8) * WIDE)


@pytest.mark.parametrize("barriers", [1, 2])
@pytest.mark.parametrize("schedule", ["interleaved", "zb-v"])
def test_a_large_vocabulary_takes_less_time_on_all_ranks_under_chunks_too(schedule: str, barriers: int) -> None:
    large, parallel = replace(UNTIED, vocab=131072), replace(WHOLE, schedule=schedule, pp=2, vp=2)
    alone, shared = of(parallel, large), of(replace(parallel, barriers=barriers), large)
    assert shared.seconds < alone.seconds
    most = [max(memory.activations for memory in found.memory) for found in (alone, shared)]
    one = most[0] / 2
    assert most[0] <= most[1] <= most[0] + barriers * one


def test_logits_and_messages_take_what_the_code_keeps() -> None:
    before = of(WHOLE).memory
    # bytes per element of hidden states: 3 outputs of 2, 4 embeddings and gradients of 2; with one barrier 2 parts of 2
    # microbatches of 2 each, on the last rank 2 of 4 ranks and of its own, and four of 4; with two barriers 4 + 4 + 2
    elsewhere, last = {1: 6 + 8 + 8, 2: 6 + 8 + 10}, {1: 6 + 8 + 2 * 5 * 2 + 16, 2: 6 + 8 + 10}
    for barriers, parallel in SHARED.items():
        after = of(parallel).memory
        # 2048 x 4096 logits: exponentials twice, two tensors of float32, one in bf16
        assert {one.logits for one in after} == {18 * 2048 * 4096}
        more = [there.buffers - here.buffers for here, there in zip(before, after, strict=True)]
        assert more == pytest.approx([elsewhere[barriers] * WIDE] * 3 + [last[barriers] * WIDE])


def test_three_products_of_a_part_of_the_rows() -> None:
    one = Product(2048, 1024, 4096).seconds(H100, "bfloat16", 2)
    for barriers, products in {1: (2, 1), 2: (1, 2)}.items():
        assert [part.products for part in head_times(rank_of(barriers))] == pytest.approx(
            [count * one for count in products]
        )
        of_layer = sum(part.products for part in layer(rank_of(barriers)))
        # 8 microbatches
        assert of(SHARED[barriers]).parts.products == pytest.approx(8 * (of_layer + 3 * one))


def test_passes_over_memory_are_those_of_the_code() -> None:
    logits, touched = 2048 * 4096, H100.touch_bytes_per_s
    rate = H100.loss_bytes_per_s or touched
    # added to gradients: 4096 x 1024 elements, 2 bytes and twice 4
    added = 10 * 4096 * 1024
    # S: 26 bytes a logit, with one barrier a cast from 4 to 2 bytes, and 16 bytes of rows of labels;
    # T: two products of 8 bytes and a cast, with two barriers another cast of hidden states
    one, two = head_times(rank_of(1)), head_times(rank_of(2))
    assert one.logits.memory == pytest.approx(32 * logits / rate + 16 * WIDE / touched)
    assert one.logits_back.memory == pytest.approx(22 * logits / rate + added / touched)
    assert two.logits.memory == pytest.approx(26 * logits / rate)
    assert two.logits_back.memory == pytest.approx(22 * logits / rate + (6 * WIDE + added) / touched)
    ends = {barriers: end_times(rank_of(barriers)) for barriers in (1, 2)}
    # rows read and masked in bf16: 8 bytes; masked, cast and added: 4 + 6 + 12
    assert ends[1].every.forward.memory == pytest.approx(8 * WIDE / touched)
    assert ends[1].every.input.memory == pytest.approx(22 * WIDE / touched)
    # parts of 4 ranks: two of 2 bytes scaled to 4, added twice; scaled and cast
    assert ends[1].last.input.memory == pytest.approx((4 * 36 + 14) * WIDE / touched)
    assert ends[2].last.input.memory == pytest.approx(6 * WIDE / touched)


def test_meetings_take_as_long_as_their_messages() -> None:
    link = H100.inside
    # 4 ranks: two rounds of latency; hidden states of 2 bytes go round, statistics of 12 bytes a token pass 3 ranks
    rounds = 2 * link.latency_s
    share = rounds + 2 * WIDE / link.bytes_per_s
    statistics = rounds + 3 * 12 * 2048 / link.bytes_per_s
    # two parts of 2 bytes from each of three ranks, one behind the other
    parts = link.latency_s + 3 * 2 * 2 * WIDE / link.bytes_per_s
    assert meeting_times(rank_of(1)) == pytest.approx((share, statistics, statistics + parts))
    assert meeting_times(rank_of(2)) == pytest.approx((share, statistics, rounds + 4 * WIDE / link.bytes_per_s))
    # one sum of embeddings comes first, and as many gradients last
    assert embedding_seconds(rank_of(1), 3) == pytest.approx(4 * share)


def test_messages_are_counted_in_the_traffic() -> None:
    before = of(WHOLE).traffic
    # one barrier: output, embedding, its gradient and two parts in bf16; two: one part in float32; on 3 of 4 ranks
    states = 3 / 4 * (2 + 2 + 2 + 4) * WIDE
    for parallel in SHARED.values():
        after = of(parallel).traffic
        assert after.inside.pipeline - before.inside.pipeline == pytest.approx(8 * (states + 3 * 12 * 2048))
        assert after.between == before.between


def test_a_large_vocabulary_takes_less_time_on_all_ranks() -> None:
    large = replace(UNTIED, vocab=131072)
    alone = of(WHOLE, large).seconds
    for parallel in SHARED.values():
        assert of(parallel, large).seconds < alone


@pytest.mark.parametrize("barriers", [1, 2])
def test_a_long_batch_takes_as_long_as_played(barriers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parallel = replace(SHARED[barriers], global_batch=24)
    continued = of(parallel).seconds
    monkeypatch.setattr("megatron_cp.planner.pipelining.LONG", 24)
    assert continued == pytest.approx(of(parallel).seconds, rel=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": None}, "needs a pipeline and --pp-schedule; add 1f1b"),
        ({"barriers": 3}, "takes 1 or 2 barriers, got 3"),
        ({"schedule": "2bw"}, "2bw has no place for a vocabulary over all ranks, for it ends its steps without"),
        ({"slices": 2}, "takes whole sequences, got 2 slices"),
        ({"moves": Offload(2)}, "got a limit of 2 chunks"),
        ({"loss_chunks": 2}, "does not go with output layer and loss in chunks"),
        ({"precision": "fp8"}, "does not go with products in fp8"),
        ({"fsdp": True}, "does not go with fully sharded data parallelism"),
        ({"local_steps": 4}, "does not go with islands of replicas"),
    ],
)
def test_what_training_refuses_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        of(replace(SHARED[1], **changes))


def test_multi_token_prediction_is_refused() -> None:
    with pytest.raises(ValueError, match="does not go with multi-token prediction"):
        of(SHARED[1], replace(UNTIED, mtp=1))


def test_a_recipe_says_so_and_nothing_is_left_out() -> None:
    flags = "--pipeline-model-parallel-size 2 --pp-schedule 1f1b --pp-vocab-parallel 2"
    read = recipe.load("llama3.1-8b-8k-h100x8", Unset({}), flags.split())
    assert parallel_of(read, 32).barriers == 2
    assert unmodelled(read) == []


def test_a_plan_weighs_it_where_asked_and_writes_it(tmp_path: Path) -> None:
    model = model_of(recipe.load("models/llama3.1-8b", Unset({})))
    asked = PlanRequest(
        model=model,
        seq=4096,
        gpus=8,
        cluster=H100,
        global_batch=32,
        schedules=("1f1b",),
        fixed=FixedSizes(tp=1, cp=1, pp=8, dp=1, vp=1, micro_batch=1),
    )
    (alone,), (best,) = (search(replace(asked, barriers=barriers), record, 1).options for barriers in ((), (1, 2)))
    assert alone.parallel.barriers == 0
    assert best.parallel.barriers in (1, 2)
    assert best.seconds < alone.seconds
    file = tmp_path / "planned.yaml"
    file.write_text(as_recipe(best, "models/llama3.1-8b"))
    assert parallel_of(recipe.load(str(file), {"DATA_PATH": "corpus"}), 32) == best.parallel
