"""Free-running ranks: the bits of the same run with Megatron's sums in every step, without anybody waiting for them."""

import time
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_cp.megatron.arguments.free_running import check_free_running
from megatron_cp.megatron.hooks import FOR_FREE_RUNNING
from megatron_cp.megatron.machine.facts import Machine
from megatron_cp.megatron.process.launch import features
from megatron_cp.megatron.rebind import replace, restore
from tests.megatron import pretraining
from tests.megatron.pipeline.test_schedules import refusal
from tests.megatron.pipeline.test_without_flush import EVALUATION, RECOMPUTE, TWO, assert_bit_equal
from tests.megatron.pretraining import tiny
from tests.ranks import run_ranks, run_ranks_with_log

MODEL = "--num-layers 4 --rerun-mode disabled --clip-grad 0 --log-interval 100"
FREE = "--pp-free-running"
BUFFERS = "--bf16 --use-distributed-optimizer"
SLOW = 0.25
"""Seconds that the first stage adds to each of its steps, far longer than an update of the tiny model."""


def timed(flags):
    """Losses, parameters, and when each step's forwards and backwards began and ended, on a slow first stage."""
    from megatron.core import parallel_state

    began, ended = [], []

    def noting(old):
        class Noted(old):
            def begin(self, micros):
                began.append(time.monotonic())
                return super().begin(micros)

            def end(self, executor):
                super().end(executor)
                if parallel_state.is_pipeline_first_stage():
                    time.sleep(SLOW)
                ended.append(time.monotonic())

        return Noted

    done = replace("megatron_cp.megatron.pipeline.schedule:WithoutFlush", noting)
    try:
        log, parameters = pretraining.trained(flags)
    finally:
        restore(done)
    return log, dict(parameters), began, ended


def run(world, *flags):
    ranks, said = run_ranks_with_log(world, timed, tiny(*flags))
    log = next(found[0] for found in ranks if found[0][0]["loss"] is not None)
    (_, _, _, ended), (_, _, began, _) = ranks[0], ranks[-1]
    early = [begin < end for begin, end in zip(began[1:], ended, strict=False)]
    return log, [found[1] for found in ranks], early, said


def losses(found):
    return [{"loss": step["loss"], "iteration": step["iteration"]} for step in found[0]], found[1]


def assert_free(world, *flags, saved=""):
    """The last rank runs ahead of the first one's step, which it waits for otherwise, and nothing else changes."""
    free, waiting = run(world, MODEL, *flags, FREE, saved), run(world, MODEL, *flags)
    assert_bit_equal(losses(free), losses(waiting))
    assert any(free[2])
    assert not any(waiting[2])
    assert {step["grad_norm"] for step in free[0]} == {None}
    assert all(step["grad_norm"] > 0 for step in waiting[0])
    assert "ranks run freely: they wait for each other only where the run logs (now every 100 steps)" in free[3]
    assert ("grad norm" in free[3], "grad norm" in waiting[3]) == (False, True)
    assert "learning rate: " in free[3]
    return free


def test_ranks_run_freely_with_the_bits_of_ranks_that_wait():
    assert_free(2, TWO, "--global-batch-size 4 --train-iters 3 --pp-schedule 2bw", RECOMPUTE)


@pytest.mark.slow
def test_four_stages_run_freely():
    words = "--pipeline-model-parallel-size 4 --global-batch-size 6 --train-iters 5 --pp-schedule 2bw"
    # the ranks meet for the evaluations after the second and the fourth step
    *_, early, _ = assert_free(4, words, EVALUATION)
    assert early == [False, False, True, False]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        f"--pp-schedule 2bw --context-parallel-size 2 --cp-comm-type zigzag {BUFFERS} {RECOMPUTE}",
        f"--pp-schedule pipedream-vertical {BUFFERS} --overlap-grad-reduce",
        "--pp-schedule 2bw --tensor-model-parallel-size 2 --sequence-parallel --num-experts 4 "
        "--moe-router-load-balancing-type none",
    ],
    ids=["context", "replicas", "tensor"],
)
def test_other_parallelism_runs_freely(flags):
    assert_free(4, TWO, "--global-batch-size 8 --train-iters 3", flags)


@pytest.mark.slow
def test_a_free_run_that_is_resumed_equals_the_whole_one(tmp_path):
    words = (TWO, "--global-batch-size 4 --train-iters 5 --pp-schedule pipedream", BUFFERS)
    whole = assert_free(2, *words, saved=f"--save {tmp_path} --save-interval 3")
    (Path(tmp_path) / "latest_checkpointed_iteration.txt").write_text("3")
    again = run(2, MODEL, *words, FREE, f"--load {tmp_path}")
    assert f"earlier weights from {tmp_path}/iter_0000003" in again[3]
    steps, parameters = losses(whole)
    assert_bit_equal((steps[3:], parameters), losses(again))


REFUSED = {
    "flush": (
        "--pp-schedule 1f1b",
        "--pp-free-running needs steps without a flush, got --pp-schedule 1f1b; take 2bw or pipedream or",
    ),
    "norm": (
        "--pp-schedule 2bw --clip-grad 1",
        "--pp-free-running does not go with --clip-grad 1, for which ranks wait in every step for a norm of all "
        "gradients; pass --clip-grad 0",
    ),
    "overflows": (
        "--pp-schedule 2bw --fp16",
        "go with --fp16, for which ranks wait in every step for each other's over",
    ),
    "scale": ("--pp-schedule 2bw --bf16 --loss-scale 8", "go with --loss-scale 8, for which ranks wait"),
    "tokens": ("--pp-schedule 2bw --calculate-per-token-loss", "leave --calculate-per-token-loss out"),
    "balance": ("--pp-schedule 2bw --num-experts 4", "go with --num-experts 4, for which ranks wait"),
    "zeros": ("--pp-schedule 2bw --log-num-zeros-in-grad", "leave --log-num-zeros-in-grad out"),
    "weights": ("--pp-schedule 2bw --log-params-norm", "leave --log-params-norm out"),
    "signals": ("--pp-schedule 2bw --exit-signal-handler", "leave --exit-signal-handler out"),
    "duration": ("--pp-schedule 2bw --exit-duration-in-mins 5", "go with --exit-duration-in-mins 5, for which ranks"),
    "timers": ("--pp-schedule 2bw --timing-log-level 2", "pass --no-barrier-with-level-1-timing"),
}


def test_what_ranks_would_wait_for_is_refused_in_one_line():
    cases = {name: tiny(MODEL, TWO, FREE, flags) for name, (flags, _) in REFUSED.items()}
    cases["ends"] = tiny(MODEL, TWO, FREE, "--pp-schedule 2bw", without="--untie-embeddings-and-output-weights")
    (lines,) = run_ranks(1, refusal, cases)
    for name, (_, text) in [*REFUSED.items(), ("ends", ("", "pass --untie-embeddings-and-output-weights"))]:
        assert text in lines[name], (name, lines[name])
        assert "\n" not in lines[name]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"untie_embeddings_and_output_weights": False}, "not go with embeddings tied by the lack of --untie"),
        ({"pp_schedule": None}, "needs --pp-schedule 2bw or pipedream or pipedream-vertical, got none"),
        ({"mtp_num_layers": 1}, "leave --mtp-num-layers out"),
        ({"dsa_indexer_loss_coeff": 0.5}, "go with --dsa-indexer-loss-coeff 0.5"),
        ({"sft": True}, "leave --sft out"),
        ({"dataloader_inter_document_masking": True}, "leave --dataloader-inter-document-masking out"),
        ({"num_experts": 4, "moe_z_loss_coeff": 0.1}, "without --moe-z-loss-coeff"),
    ],
)
def test_other_waits_are_refused(asked, message):
    given = {"pp_schedule": "2bw", "pp_free_running": True, "untie_embeddings_and_output_weights": True} | asked
    with pytest.raises(ValueError, match=message):
        check_free_running(Namespace(**given))


def test_hooks_come_with_the_flag_alone():
    machine = Machine(gpu=True, te=True, nvrx=True)
    words = ["--pp-schedule", "2bw"]
    added = set(features([*words, FREE], machine).hooks) - set(features(words, machine).hooks)
    assert added == set(FOR_FREE_RUNNING)


def test_without_the_flag_nothing_is_refused():
    check_free_running(Namespace(pp_schedule="2bw", clip_grad=1.0))
    check_free_running(Namespace(pp_schedule=None, clip_grad=1.0))
