"""Through the real pretrain() sequences in slices train as whole ones."""

import math
from argparse import Namespace
from functools import cache

import pytest
import torch

from megatron_cp.context.masks import CAUSAL
from megatron_cp.context.slices import SlicesInFlight
from megatron_cp.megatron.rebind import replace, restore
from megatron_cp.megatron.run import Settings
from tests.cases import slow_unless
from tests.megatron import pretraining
from tests.megatron.pipeline.test_schedules import refusal
from tests.megatron.pretraining import tiny
from tests.megatron.test_packed import corpus_of_documents
from tests.ranks import run_ranks

MODEL = "--num-layers 4 --global-batch-size 8 --train-iters 3 --seq-length 64 --max-position-embeddings 64"
# for ranks that share each layer: their steps are slow over gloo
SHORT = "--global-batch-size 4 --train-iters 2"
TWO, FOUR = "--pipeline-model-parallel-size 2", "--pipeline-model-parallel-size 4"
CHUNKS = "--num-virtual-stages-per-pipeline-rank 2"
CP = "--context-parallel-size 2 --cp-comm-type"
TP, SP = "--tensor-model-parallel-size 2", "--sequence-parallel"
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
EVALUATE = "--eval-iters 1 --eval-interval 1"


def trained(flags):
    """Losses and parameters of this rank, the calls of attention in slices, and the lengths of the slices."""
    made = []

    class Noted(SlicesInFlight):
        """Notes the slices of packed documents: how many go on from earlier slices, and how many hold several."""

        packs = (0, 0)

        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

        def packed(self, own):
            found = super().packed(own)
            before, several = self.packs
            self.packs = before + bool(found.earlier(CAUSAL).all), several + (len(own.mask(CAUSAL).all) > self.samples)
            return found

    done = replace("megatron_cp.megatron.pipeline.schedule:SlicesInFlight", lambda old: Noted)
    try:
        log, parameters = pretraining.trained(flags)
    finally:
        restore(done)
    return log, dict(parameters), [(slices.calls, [*map(len, slices.tokens)], slices.packs) for slices in made]


def run(world_size, *flags):
    without = "--mock-data" if any("--data-path" in each for each in flags) else ""
    ranks = run_ranks(world_size, trained, tiny(MODEL, *flags, without=without))
    log = next(log for log, *_ in ranks if log[0]["loss"] is not None)
    return log, [parameters for _, parameters, _ in ranks], [made for *_, made in ranks]


@pytest.fixture(scope="module")
def shared():
    """Runs that several tests compare with, by their flags, each made once."""
    return cache(run)


def assert_alike(found, expected):
    for step, other in zip(found[0], expected[0], strict=True):
        assert step["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert step["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert list(ours) == list(theirs)
        for name, weight in theirs.items():
            assert (ours[name] - weight).abs().max() <= 1e-5 * weight.abs().max(), name


def assert_bit_equal(found, expected):
    assert found[0] == expected[0]
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def assert_sliced(found, k, packed=False):
    for made in found[2]:
        ((calls, lengths, packs),) = made
        assert calls > 0
        assert not packed or min(packs) > 0
        assert len(lengths) == k
        assert sum(lengths) == 64
        assert lengths[0] > lengths[-1] or k == 8


MASKED = (TWO, "--eod-mask-loss")
OVERLAPPED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
LOCAL = "--transformer-impl local"
CASES = {
    "masked": (2, 4, "1f1b", MASKED),
    "gpipe": (2, 3, "gpipe", MASKED),
    "izb": (2, 4, "izb", (TWO, CHUNKS)),
    "recompute, window": (2, 8, "1f1b", (TWO, RECOMPUTE, EVALUATE, "--window-size 9,0 --calculate-per-token-loss")),
    "four ranks": (4, 3, "zb-h1", (FOUR,)),
    "ulysses": (4, 4, "zb-h1", (TWO, CP, "ulysses", SHORT)),
    "all-gather": (4, 3, "interleaved", (TWO, CHUNKS, CP, "all-gather", SHORT)),
    "tensor": (4, 3, "1f1b", (*MASKED, TP, SHORT)),
    "tensor and sequence": (4, 4, "zb-h1", (TWO, TP, SP, "--calculate-per-token-loss", SHORT)),
    "tensor and context": (8, 4, "1f1b", (TWO, TP, SP, CP, "zigzag", OVERLAPPED, SHORT)),
    "tensor and chunks": (4, 2, "interleaved", (TWO, TP, SP, CHUNKS, RECOMPUTE, EVALUATE, SHORT)),
    "placed": (4, 4, "gpipe", (TWO, TP, SP, "--tp-comm-type 1d", LOCAL, SHORT)),
    "placed on a grid": (4, 2, "1f1b", (TWO, TP, SP, "--tp-comm-type 2d --tp-grid 1 2", LOCAL, SHORT)),
}
CHOSEN = ["masked"]


def whole(flags):
    """The flags of Megatron's own schedule, which all schedules equal bit for bit, with attention of ours."""
    return flags if CP in flags else (*flags, "--cp-comm-type zigzag")


@pytest.mark.parametrize("case", slow_unless(CHOSEN, CASES))
def test_slices_train_as_whole_sequences(shared, case):
    world_size, k, schedule, flags = CASES[case]
    found = shared(world_size, *flags, f"--pp-schedule {schedule} --pp-slices {k}")
    assert_sliced(found, k)
    assert_alike(found, shared(world_size, *whole(flags)))


@pytest.mark.slow
def test_one_slice_is_the_schedule_itself(shared):
    flags = whole(MASKED)
    assert_bit_equal(run(2, *flags, "--pp-schedule 1f1b --pp-slices 1"), shared(2, *flags))


@pytest.mark.slow
def test_slices_that_move_away_train_bit_for_bit_as_without(shared):
    flags = (*MASKED, "--pp-schedule 1f1b --pp-slices 4")
    assert_bit_equal(run(2, *flags, "--pp-offload 2"), shared(2, *flags))


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """The flags of packed documents; samples of two, one stream in a stage."""
    corpus = corpus_of_documents(tmp_path_factory.mktemp("sliced"))
    # Adam's first step is the sign of a gradient, and those of a query with one key are 0 but for rounding
    return f"{corpus} --dataloader-inter-document-masking --adam-eps 1e-5"


PACKED = {
    "zb-h1, one sample": (4, 4, "zb-h1", (TWO, CP, "all-gather", SHORT, "--micro-batch-size 1")),
    "interleaved": (4, 2, "interleaved", (TWO, CHUNKS, CP, "ulysses", SHORT)),
    "middle stages": (4, 3, "zb-h1", (FOUR, "--window-size 9,0 --eod-mask-loss")),
    "tensor and sequence": (4, 3, "1f1b", (TWO, TP, SP, RECOMPUTE, EVALUATE, SHORT, "--split 70,30,0")),
    "learned positions": (2, 3, "gpipe", (TWO, "--position-embedding-type learned_absolute")),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", PACKED)
def test_slices_of_packed_documents_train_as_whole_sequences(documents, case):
    world_size, k, schedule, flags = PACKED[case]
    found = run(world_size, documents, *flags, f"--pp-schedule {schedule} --pp-slices {k}")
    assert_sliced(found, k, packed=True)
    assert_alike(found, run(world_size, documents, *whole(flags)))


@pytest.mark.slow
def test_slices_of_packed_documents_that_move_away_train_as_whole_sequences(documents):
    flags = (documents, TWO, CP, "zigzag", "--calculate-per-token-loss", SHORT)
    found, moved = (run(4, *flags, f"--pp-schedule 1f1b --pp-slices 4 {more}") for more in ("", "--pp-offload 2"))
    assert_sliced(moved, 4, packed=True)
    assert_alike(found, run(4, *flags))
    assert_bit_equal(moved, found)


@pytest.mark.parametrize(("sequence_parallel", "multiple"), [(False, 4), (True, 8)])
def test_slices_divide_over_all_ranks_that_share_their_tokens(sequence_parallel, multiple):
    args = Namespace(
        pp_schedule="1f1b",
        pp_slices=5,
        hidden_size=32,
        num_attention_heads=4,
        seq_length=200,
        context_parallel_size=2,
        tensor_model_parallel_size=4,
        sequence_parallel=sequence_parallel,
    )
    lengths = Settings.of(args).slice_lengths
    assert sum(lengths) == 200
    assert math.gcd(*lengths) == multiple


SLICED = "--pp-schedule 1f1b --pp-slices 2"
REFUSED = {
    "--pp-slices 4": "--pp-slices 4 needs --pp-schedule",
    f"{TWO} --pp-schedule zb-v --pp-slices 2": "zb-v has no order for 2 slices of a sequence; take one of",
    f"{TWO} --pp-schedule 1f1b --pp-slices 0": "1 slice or more, got 0",
    f"{TWO} --pp-schedule 1f1b --pp-slices 33": "--pp-slices 33: 33 slices of 64 tokens in multiples of 2 leave some",
    f"{TWO} --pp-schedule 1f1b --pp-slices 2 --mtp-num-layers 1": "multi-token prediction",
    f"{TWO} --pp-schedule 1f1b --pp-slices 2 --num-experts 4": "experts, whose auxiliary losses",
    f"{TWO} --pp-schedule 1f1b --pp-slices 2 --cp-sink 1": "attention sinks",
    f"{TWO} --pp-schedule 1f1b --pp-slices 2 --cp-alibi": "ALiBi",
    f"{TWO} --pp-schedule 1f1b --pp-slices 2 --cp-chunks 2": "attention in chunks over time",
    f"{TWO} {SLICED} --sft {CP} all-gather --cp-document-layout blocks": "a layout of packed documents, which balances",
}


def test_what_slices_cannot_do_is_refused_in_one_line():
    (lines,) = run_ranks(1, refusal, {flags: tiny(MODEL, flags) for flags in REFUSED})
    for flags, text in REFUSED.items():
        assert text in lines[flags], flags
        assert "\n" not in lines[flags]
