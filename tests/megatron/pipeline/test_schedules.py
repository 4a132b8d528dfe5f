"""Through the real pretrain() every schedule trains as Megatron's own: same losses, same parameters, bit for bit."""

import sys
from datetime import timedelta
from functools import cache

import pytest
import torch

from megatron_cp.megatron.rebind import replace, restore
from megatron_cp.pipeline.passes import check
from megatron_cp.pipeline.schedule import parse
from tests.cases import slow_unless
from tests.megatron import pretraining
from tests.megatron.pipeline.meeting import meeting_wires
from tests.megatron.pretraining import tiny
from tests.ranks import run_ranks

# stands for leaving this flag out
TIED = "--untie-embeddings-and-output-weights"
MODEL = "--num-layers 4 --global-batch-size 8 --train-iters 3"


PATIENCE = timedelta(minutes=5)


def trained(flags, patience=PATIENCE):
    """What this rank knows after training: losses of each iteration, and its parameters by their name in the model.

    The last iteration also has the losses of all evaluations.

    Ranks of a schedule of ours wait for each other at the first message of each communicator, as NCCL lets them.
    """
    made, evaluated = [], []
    done = [
        replace("megatron_cp.megatron.pipeline.schedule:wires", lambda wires: meeting_wires(wires, made, patience)),
        replace("megatron.training.training:evaluate", lambda old: pretraining.noting(old, evaluated)),
    ]
    try:
        log, parameters = pretraining.trained(flags)
    finally:
        for each in done:
            restore(each)
    log[-1]["evaluated"] = evaluated
    assert any(wire.met for wire in made) == any("--pp-schedule" in flag for flag in flags)
    return log, dict(parameters)


def run(world_size, *flags):
    """Losses of the last pipeline stage, and every rank's parameters."""
    without = TIED if TIED in flags else ""
    ranks = run_ranks(world_size, trained, tiny(MODEL, *(flag for flag in flags if flag != TIED), without=without))
    log = next(log for log, _ in ranks if log[0]["loss"] is not None)
    return log, [parameters for _, parameters in ranks]


@pytest.fixture(scope="module")
def megatrons_own():
    """Runs of Megatron's own drivers, by their flags, each made once."""
    return cache(run)


def assert_bit_equal(found, expected):
    (log, parameters), (other_log, other_parameters) = found, expected
    assert log[-1]["evaluated"] == other_log[-1]["evaluated"]
    assert [step["loss"] for step in log] == [step["loss"] for step in other_log]
    assert [step["grad_norm"] for step in log] == [step["grad_norm"] for step in other_log]
    for ours, theirs in zip(parameters, other_parameters, strict=True):
        assert list(ours) == list(theirs)
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


TWO = "--pipeline-model-parallel-size 2"
CHUNKS = "--num-virtual-stages-per-pipeline-rank 2"
EVALUATED = "--eval-interval 3 --eval-iters 2 --eval-global-batch-size 12"


# every schedule's gradients are compared with Megatron's own in bench/test_pipeline too
@pytest.mark.smoke
@pytest.mark.parametrize("schedule", slow_unless(["zb-h1"], ["gpipe", "1f1b", "dapple-b", "zb-h1", "zb-h2"]))
def test_one_chunk_per_rank_trains_as_1f1b(megatrons_own, schedule):
    expected = megatrons_own(2, TWO, EVALUATED)
    assert expected[0][-1]["evaluated"]
    assert_bit_equal(run(2, TWO, EVALUATED, f"--pp-schedule {schedule}"), expected)


def hang_without_meeting(flags):
    """Where this rank's first step hangs if ranks come to their first messages in the order of the schedule."""
    done = replace("megatron_cp.pipeline.channels:Channels.meet", lambda _: lambda self, token: None)
    try:
        with pytest.raises(TimeoutError) as hang:
            trained(flags, timedelta(seconds=1))
    finally:
        restore(done)
    return str(hang.value)


def test_ranks_that_do_not_meet_beforehand_hang_in_the_first_step():
    lines = run_ranks(2, hang_without_meeting, tiny(MODEL, TWO, "--pp-schedule zb-h1"))
    expected = [f"rank {rank} waits for rank {1 - rank} at its first message in " for rank in range(2)]
    assert [line.startswith(text) for line, text in zip(lines, expected, strict=True)] == [True, True]
    # each in a communicator of its own
    assert len({line.split()[-1] for line in lines}) == 2


@pytest.mark.parametrize("schedule", slow_unless(["izb"], ["interleaved", "breadth-first", "izb", "gis"]))
def test_several_chunks_per_rank_train_as_interleaved(megatrons_own, schedule):
    expected = megatrons_own(2, TWO, CHUNKS, EVALUATED)
    assert_bit_equal(run(2, TWO, CHUNKS, EVALUATED, f"--pp-schedule {schedule}"), expected)


TP = "--tensor-model-parallel-size 2"
EXPERTS = "--num-experts 4 --moe-router-topk 2 --moe-aux-loss-coeff 0.01 --moe-token-dispatcher-type alltoall"
ONE_CHUNK, TWO_CHUNKS = ("zb-h1", ""), ("izb", CHUNKS)
COMBINED = {
    "tied embeddings, full recompute": (
        2,
        ONE_CHUNK,
        (
            TIED,
            "--calculate-per-token-loss",
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        ),
    ),
    "tied embeddings in chunks, distributed optimizer in bf16": (
        4,
        TWO_CHUNKS,
        (TIED, "--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
    ),
    "tensor and sequence parallel": (4, TWO_CHUNKS, (TP, "--sequence-parallel")),
    "tensor parallel, biases": (4, ONE_CHUNK, (TP, "--add-qkv-bias")),
    "context parallel, experts": (4, TWO_CHUNKS, (EXPERTS, "--context-parallel-size 2 --cp-comm-type zigzag")),
    "expert parallel, overlapped": (
        4,
        ONE_CHUNK,
        (EXPERTS, "--expert-model-parallel-size 2 --overlap-grad-reduce"),
    ),
}


CHOSEN = ["tensor and sequence parallel"]


@pytest.mark.parametrize("case", slow_unless(CHOSEN, COMBINED))
def test_combined_with_other_features_trains_as_megatrons_own(megatrons_own, case):
    world_size, (schedule, chunks), flags = COMBINED[case]
    flags = (*flags, "--train-iters 2")
    assert_bit_equal(
        run(world_size, TWO, chunks, *flags, f"--pp-schedule {schedule}"),
        megatrons_own(world_size, TWO, chunks, *flags),
    )


FOUR = "--pipeline-model-parallel-size 4 --global-batch-size 16"


# by the number of ranks: with two pipelines each has half of the microbatches
TABLES = {
    2: """
    0F0 0F1 0B0 0F2 0I1 0F3 0I2 0W1 0W2 0B3
    1F0 1B0 1F1 1I1 1F2 1I2 1W1 1F3 1W2 1B3
    """,
    4: """
    0F0 0F1 0I0 0W0 0B1
    1F0 1I0 1F1 1W0 1B1
    """,
}


def trained_with_a_table(flags, text):
    """The same with the table of this text in the place of the named schedule's."""
    done = replace(
        "megatron_cp.megatron.pipeline.tables:build", lambda _: lambda name, *_, **__: check(parse(text, name))
    )
    try:
        return trained(flags)
    finally:
        restore(done)


@pytest.mark.parametrize(("world_size", "flags"), slow_unless([(2, ())], [(2, ()), (4, ("--overlap-grad-reduce",))]))
def test_whole_and_split_backwards_in_one_step_train_as_1f1b(megatrons_own, world_size, flags):
    ours = tiny(MODEL, TWO, *flags, "--pp-schedule zb-h1")
    ranks = run_ranks(world_size, trained_with_a_table, ours, TABLES[world_size])
    log = next(log for log, _ in ranks if log[0]["loss"] is not None)
    assert_bit_equal((log, [parameters for _, parameters in ranks]), megatrons_own(world_size, TWO, *flags))


@pytest.mark.slow
def test_four_uneven_stages_train_as_1f1b(megatrons_own):
    uneven = (FOUR, "--num-layers 5 --decoder-first-pipeline-num-layers 2")
    assert_bit_equal(run(4, *uneven, "--pp-schedule zb-h1"), megatrons_own(4, *uneven))


@pytest.mark.slow
def test_four_ranks_train_as_interleaved(megatrons_own):
    chunks = (FOUR, CHUNKS, "--num-layers 8")
    assert_bit_equal(run(4, *chunks, "--pp-schedule izb"), megatrons_own(4, *chunks))


def test_fewer_microbatches_than_ranks_train_as_1f1b(megatrons_own):
    few = "--pipeline-model-parallel-size 3 --num-layers 3 --global-batch-size 4 --train-iters 2"
    assert_bit_equal(run(3, few, "--pp-schedule zb-h1"), megatrons_own(3, few))


@pytest.mark.slow
def test_a_weight_shared_inside_a_chunk_trains_as_1f1b_but_for_rounding(megatrons_own):
    # the last stage's copy of the tied embedding serves as embedding and twice as head: W adds the uses one by one,
    # autograd adds them to each other first
    flags = (TWO, TIED, "--mtp-num-layers 1 --cp-comm-type zigzag")
    (log, _), (other_log, _) = run(2, *flags, "--pp-schedule zb-h1"), megatrons_own(2, *flags)
    for step, other in zip(log, other_log, strict=True):
        assert step["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert step["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


REFUSED = {
    "one rank": ("--pp-schedule zb-h1", "needs --pipeline-model-parallel-size of at least 2, got 1"),
    "unknown": (f"{TWO} --pp-schedule zb-h3", "did you mean 'zb-h"),
    "chunks": (
        f"{TWO} {CHUNKS} --pp-schedule zb-h1",
        "zb-h1 has 1 chunk per rank, got --num-virtual-stages-per-pipeline-rank 2",
    ),
    "no chunks": (f"{TWO} --pp-schedule izb", "needs more than one chunk per rank, got 1"),
    "microbatches": (
        "--pipeline-model-parallel-size 4 --num-layers 16 --num-virtual-stages-per-pipeline-rank 4 "
        "--global-batch-size 10 --pp-schedule interleaved",
        "m = 5, v = 4; the nearest m that works is",
    ),
    "graphs": (f"{TWO} --pp-schedule zb-h1 --cuda-graph-impl full_iteration", "does not do CUDA graphs"),
    "graphs by an older name": (f"{TWO} --pp-schedule zb-h1 --enable-cuda-graph", "does not do CUDA graphs"),
    "experts": (f"{TWO} --pp-schedule zb-h1 --overlap-moe-expert-parallel-comm", "overlap of expert-parallel"),
    **{
        f"vocabulary, {name}": (f"{TWO} --pp-vocab-parallel 1 {flags}", text)
        for name, flags, text in (
            ("no schedule", "", "1 needs --pp-schedule; add 1f1b"),
            ("barriers", "--pp-schedule 1f1b --pp-vocab-parallel 3", "takes 1 or 2 barriers, got 3"),
            (
                "chimera",
                "--pp-schedule chimera",
                "chimera has no place for a vocabulary over all ranks, for it holds two copies",
            ),
            ("slices", "--pp-schedule 1f1b --pp-slices 2", "takes whole sequences, got 2 slices"),
            ("moves", "--pp-schedule 1f1b --pp-offload 2", "keeps activations where they are, got a limit of 2"),
            ("mtp", "--pp-schedule 1f1b --mtp-num-layers 1", "does not do multi-token prediction"),
            ("legacy", "--pp-schedule 1f1b --ckpt-format torch --save somewhere", "torch_dist can be loaded with and"),
        )
    },
    "limit without a schedule": (f"{TWO} --pp-offload 2", "--pp-offload 2 needs --pp-schedule"),
    "limit too small": (f"{TWO} --pp-schedule dapple-b --pp-offload 1", "its smallest limit is 2"),
    "no limit": (f"{TWO} --pp-schedule dapple-b --pp-offload two", "a number of chunks from 1 up, or auto, got 'two'"),
    "limit for no memory": (f"{TWO} --pp-schedule dapple-b --pp-offload auto", "fits --pp-memory-limit, got none"),
    "memory below the limit": (
        f"{TWO} --pp-schedule dapple-b --pp-offload 2 --pp-memory-limit 1",
        "a cap of 1 M_B is below the minimum 2 M_B",
    ),
    "target": (f"{TWO} --pp-schedule dapple-b --pp-offload 2 --pp-offload-to pier", "did you mean 'peer'"),
    "target alone": (f"{TWO} --pp-schedule dapple-b --pp-offload-to peer", "is about what --pp-offload N moves"),
    "limit beside bpipe's": (f"{TWO} --pp-schedule bpipe --pp-offload 2", "bpipe has a limit of its own, 2 chunks"),
    "lent experts": (f"{TWO} --pp-schedule bpipe --num-experts 4", "a peer cannot know the sizes"),
    "layers offloaded twice": (
        f"{TWO} --pp-schedule 1f1b --pp-offload 2 --cpu-offloading-num-layers 1",
        "--pp-offload 2 does not do offloading of layers by transformer-engine",
    ),
    "delayed": (f"{TWO} --pp-schedule zb-h1 --defer-embedding-wgrad-compute", "own delay of weight gradients"),
}


def refusal(cases):
    """The one line with which each command line is refused."""
    import os

    from megatron.training.arguments import parse_and_validate_args

    from megatron_cp.megatron.process.launch import launched

    # the arguments are refused before anybody is waited for
    os.environ["WORLD_SIZE"] = "4"
    lines = {}
    for name, flags in cases.items():
        sys.argv = ["pretrain_gpt", *flags]
        with pytest.raises(SystemExit) as stop, launched(flags):
            parse_and_validate_args()
        lines[name] = str(stop.value)
    return lines


def test_what_a_schedule_cannot_do_is_refused_in_one_line():
    (lines,) = run_ranks(1, refusal, {name: tiny(MODEL, flags) for name, (flags, _) in REFUSED.items()})
    for name, (_, text) in REFUSED.items():
        assert text in lines[name], name
        assert "\n" not in lines[name]
