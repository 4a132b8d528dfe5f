"""Through the real pretrain() every schedule trains as Megatron's own: same losses, same parameters, bit for bit."""

import pytest
import torch

from megatron_cp.megatron.rebind import replace, restore
from megatron_cp.pipeline.passes import check
from megatron_cp.pipeline.schedule import parse
from tests.megatron.pretraining import global_names, losses_of_each_iteration, start_from_names, tiny
from tests.ranks import run_ranks

# stands for leaving this flag out
TIED = "--untie-embeddings-and-output-weights"
MODEL = "--num-layers 4 --global-batch-size 8 --train-iters 3"


def trained(flags):
    """What this rank knows after training: losses of each iteration, and its parameters by their name in the model."""
    import sys

    from megatron_cp.megatron import pretrain
    from megatron_cp.megatron.launch import door

    built = []

    def prepare(config):
        start_from_names(config)
        config.post_wrap_hooks.append(lambda models: built.extend(models) or models)

    sys.argv = ["pretrain_gpt", *flags]
    with door(flags), losses_of_each_iteration() as log:
        pretrain.run(prepare=prepare)
    return log, {
        name: parameter.detach().clone() for chunk in built for name, parameter in global_names(_unwrapped(chunk))
    }


def _unwrapped(model):
    while hasattr(model, "module"):
        model = model.module
    return model


def run(world_size, *flags):
    """Losses of the last pipeline stage, and every rank's parameters."""
    without = TIED if TIED in flags else ""
    ranks = run_ranks(world_size, trained, tiny(MODEL, *(flag for flag in flags if flag != TIED), without=without))
    log = next(log for log, _ in ranks if log[0]["loss"] is not None)
    return log, [parameters for _, parameters in ranks]


@pytest.fixture(scope="module")
def megatrons_own():
    """Runs of Megatron's own drivers, by their flags, each made once."""
    runs = {}

    def once(world_size, *flags):
        if (world_size, flags) not in runs:
            runs[world_size, flags] = run(world_size, *flags)
        return runs[world_size, flags]

    return once


def assert_bit_equal(found, expected):
    (log, parameters), (other_log, other_parameters) = found, expected
    assert [step["loss"] for step in log] == [step["loss"] for step in other_log]
    assert [step["grad_norm"] for step in log] == [step["grad_norm"] for step in other_log]
    for ours, theirs in zip(parameters, other_parameters, strict=True):
        assert list(ours) == list(theirs)
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


TWO = "--pipeline-model-parallel-size 2"
CHUNKS = "--num-virtual-stages-per-pipeline-rank 2"


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "dapple-b", "zb-h1", "zb-h2"])
def test_one_chunk_per_rank_trains_as_1f1b(megatrons_own, schedule):
    assert_bit_equal(run(2, TWO, f"--pp-schedule {schedule}"), megatrons_own(2, TWO))


@pytest.mark.parametrize("schedule", ["interleaved", "breadth-first", "izb", "gis"])
def test_several_chunks_per_rank_train_as_interleaved(megatrons_own, schedule):
    assert_bit_equal(run(2, TWO, CHUNKS, f"--pp-schedule {schedule}"), megatrons_own(2, TWO, CHUNKS))


EXPERTS = "--num-experts 4 --moe-router-topk 2 --moe-aux-loss-coeff 0.01 --moe-token-dispatcher-type alltoall"
COMBINED = {
    "tied embeddings": (2, (TIED,)),
    "tensor and sequence parallel": (4, ("--tensor-model-parallel-size 2 --sequence-parallel",)),
    "tensor parallel": (4, ("--tensor-model-parallel-size 2",)),
    "context parallel": (4, ("--context-parallel-size 2 --cp-comm-type zigzag",)),
    "data parallel": (4, ()),
    "data parallel, overlapped": (4, ("--overlap-grad-reduce",)),
    "distributed optimizer": (4, ("--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",)),
    "experts": (2, (EXPERTS,)),
    "expert parallel": (4, ("--expert-model-parallel-size 2", EXPERTS)),
    "per-token loss": (2, ("--calculate-per-token-loss",)),
    "bf16": (2, ("--bf16",)),
    "biases": (2, ("--add-qkv-bias",)),
    "full recompute": (2, ("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",)),
}


@pytest.mark.parametrize("schedule", ["zb-h1", "izb"])
@pytest.mark.parametrize("case", list(COMBINED))
def test_combined_with_other_features_trains_as_megatrons_own(megatrons_own, case, schedule):
    world_size, flags = COMBINED[case]
    both = (TWO, *([CHUNKS] if schedule == "izb" else []), *flags)
    assert_bit_equal(run(world_size, *both, f"--pp-schedule {schedule}"), megatrons_own(world_size, *both))


FOUR = "--pipeline-model-parallel-size 4 --global-batch-size 16"


MIXED = """
0F0 0F1 0B0 0F2 0I1 0F3 0I2 0W1 0W2 0B3
1F0 1B0 1F1 1I1 1F2 1I2 1W1 1F3 1W2 1B3
"""


def trained_with_a_table(flags, text):
    """The same with the table of this text in the place of the named schedule's."""
    done = replace("megatron_cp.megatron.schedule:build", lambda _: lambda name, *sizes: check(parse(text, name)))
    try:
        return trained(flags)
    finally:
        restore(done)


def test_whole_and_split_backwards_in_one_step_train_as_1f1b(megatrons_own):
    flags = tiny(MODEL, TWO, "--pp-schedule zb-h1")
    ranks = run_ranks(2, trained_with_a_table, flags, MIXED)
    log = next(log for log, _ in ranks if log[0]["loss"] is not None)
    assert_bit_equal((log, [parameters for _, parameters in ranks]), megatrons_own(2, TWO))


def test_four_ranks_train_as_1f1b(megatrons_own):
    assert_bit_equal(run(4, FOUR, "--pp-schedule zb-h1"), megatrons_own(4, FOUR))


def test_four_ranks_train_as_interleaved(megatrons_own):
    chunks = (FOUR, CHUNKS, "--num-layers 8")
    assert_bit_equal(run(4, *chunks, "--pp-schedule izb"), megatrons_own(4, *chunks))


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_fewer_microbatches_than_ranks_train_as_1f1b(megatrons_own, schedule):
    few = "--pipeline-model-parallel-size 4 --global-batch-size 4"
    assert_bit_equal(run(4, few, f"--pp-schedule {schedule}"), megatrons_own(4, few))


def test_uneven_stages_train_as_1f1b(megatrons_own):
    uneven = (TWO, "--decoder-first-pipeline-num-layers 3")
    assert_bit_equal(run(2, *uneven, "--pp-schedule zb-h1"), megatrons_own(2, *uneven))
