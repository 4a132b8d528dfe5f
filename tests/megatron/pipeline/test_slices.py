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

MODEL = "--num-layers 4 --global-batch-size 8 --seq-length 64 --max-position-embeddings 64"
TWO, FOUR = "--pipeline-model-parallel-size 2", "--pipeline-model-parallel-size 4"
CHUNKS = "--num-virtual-stages-per-pipeline-rank 2"
CP = "--context-parallel-size 2 --cp-comm-type"
TP, SP = "--tensor-model-parallel-size 2", "--sequence-parallel"
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
EVALUATE = "--eval-iters 1 --eval-interval 2"


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


@cache
def run(world_size, *flags):
    without = "--mock-data" if any("--data-path" in each for each in flags) else ""
    ranks = run_ranks(world_size, trained, tiny(MODEL, *flags, without=without))
    log = next(log for log, *_ in ranks if log[0]["loss"] is not None)
    return log, [parameters for _, parameters, _ in ranks], [made for *_, made in ranks]


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


CASES = {
    "1f1b": (2, 4, "--pp-schedule 1f1b", (TWO,)),
    "1f1b in 2": (2, 2, "--pp-schedule 1f1b", (TWO,)),
    "1f1b in 3": (2, 3, "--pp-schedule 1f1b", (TWO,)),
    "1f1b in 8": (2, 8, "--pp-schedule 1f1b", (TWO,)),
    "gpipe": (2, 3, "--pp-schedule gpipe", (TWO,)),
    "zb-h1": (2, 4, "--pp-schedule zb-h1", (TWO, "--calculate-per-token-loss")),
    "interleaved": (2, 3, "--pp-schedule interleaved", (TWO, CHUNKS)),
    "izb": (2, 4, "--pp-schedule izb", (TWO, CHUNKS)),
    "four ranks": (4, 3, "--pp-schedule zb-h1", (FOUR,)),
    "zigzag": (4, 4, "--pp-schedule 1f1b", (TWO, CP, "zigzag")),
    "ulysses": (4, 4, "--pp-schedule zb-h1", (TWO, CP, "ulysses")),
    "all-gather": (4, 3, "--pp-schedule interleaved", (TWO, CHUNKS, CP, "all-gather")),
    "masked": (2, 4, "--pp-schedule 1f1b", (TWO, "--eod-mask-loss")),
    "distributed optimizer": (
        4,
        4,
        "--pp-schedule zb-h1",
        (TWO, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
    ),
    "recompute": (2, 4, "--pp-schedule 1f1b", (TWO, RECOMPUTE, EVALUATE)),
    "tensor": (4, 3, "--pp-schedule 1f1b", (TWO, TP, "--eod-mask-loss")),
    "tensor and sequence": (4, 4, "--pp-schedule zb-h1", (TWO, TP, SP)),
    "tokens of all ranks": (4, 3, "--pp-schedule gpipe", (TWO, TP, SP, "--calculate-per-token-loss")),
    "tensor and context": (8, 4, "--pp-schedule 1f1b", (TWO, TP, SP, CP, "zigzag", "--use-distributed-optimizer")),
    "tensor and chunks": (4, 2, "--pp-schedule interleaved", (TWO, TP, SP, CHUNKS, RECOMPUTE, EVALUATE)),
    "placed": (4, 4, "--pp-schedule 1f1b", (TWO, TP, SP, "--tp-comm-type 1d --transformer-impl local")),
    "placed on a grid": (
        4,
        2,
        "--pp-schedule 1f1b",
        (TWO, TP, SP, "--tp-comm-type 2d --tp-grid 1 2 --transformer-impl local"),
    ),
    "window": (2, 4, "--pp-schedule 1f1b", (TWO, "--window-size 9,0")),
}
CHOSEN = ["masked"]


@pytest.mark.parametrize("case", slow_unless(CHOSEN, CASES))
def test_slices_train_as_whole_sequences(case):
    world_size, k, schedule, flags = CASES[case]
    ours = "" if CP in flags else "--cp-comm-type zigzag"
    found = run(world_size, schedule, *flags, f"--pp-slices {k}")
    assert_sliced(found, k)
    assert_alike(found, run(world_size, schedule, *flags, ours))


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """The flags of packed documents; samples of two, one stream in a stage."""
    corpus = corpus_of_documents(tmp_path_factory.mktemp("sliced"))
    # Adam's first step is the sign of a gradient, and those of a query with one key are 0 but for rounding
    return f"{corpus} --dataloader-inter-document-masking --adam-eps 1e-5"


PACKED = {
    "1f1b, two ranks of each kind": (4, 3, "--pp-schedule 1f1b", (TWO, CP, "zigzag")),
    "zb-h1, one sample": (4, 4, "--pp-schedule zb-h1", (TWO, CP, "all-gather", "--micro-batch-size 1")),
    "interleaved": (4, 2, "--pp-schedule interleaved", (TWO, CHUNKS, CP, "ulysses")),
    "middle stages": (4, 3, "--pp-schedule zb-h1", (FOUR, "--window-size 9,0 --eod-mask-loss")),
    "tensor and sequence": (4, 3, "--pp-schedule 1f1b", (TWO, TP, SP, RECOMPUTE, EVALUATE, "--split 70,30,0")),
    "moved away": (4, 4, "--pp-schedule 1f1b --pp-offload 2", (TWO, CP, "zigzag", "--calculate-per-token-loss")),
    "learned positions": (2, 3, "--pp-schedule gpipe", (TWO, "--position-embedding-type learned_absolute")),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", PACKED)
def test_slices_of_packed_documents_train_as_whole_sequences(documents, case):
    world_size, k, schedule, flags = PACKED[case]
    ours = "" if CP in flags else "--cp-comm-type zigzag"
    found = run(world_size, documents, schedule, *flags, f"--pp-slices {k}")
    assert_sliced(found, k, packed=True)
    assert_alike(found, run(world_size, documents, schedule, *flags, ours))


@pytest.mark.slow
def test_one_slice_is_the_schedule_itself():
    assert_bit_equal(run(2, TWO, "--pp-schedule 1f1b --pp-slices 1"), run(2, TWO, "--pp-schedule 1f1b"))


@pytest.mark.slow
def test_slices_that_move_away_train_bit_for_bit_as_without():
    flags = (TWO, CP, "zigzag", "--pp-schedule 1f1b --pp-slices 4")
    assert_bit_equal(run(4, *flags, "--pp-offload 2"), run(4, *flags))


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
