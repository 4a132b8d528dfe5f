"""Stages on a V train as the same stages on the loop: Megatron's own interleaved schedule, parameter by parameter."""

import re
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_cp.megatron import hooks
from megatron_cp.megatron.checkpoint import resume
from megatron_cp.megatron.process.launch import launched
from tests.cases import slow_unless
from tests.megatron.pipeline.test_schedules import CHUNKS, EXPERTS, MODEL, TIED, TWO, refusal
from tests.megatron.pretraining import (
    pretrain_losses,
    tiny,
    trained,
)
from tests.megatron.spec_run import grad_norms, losses, train
from tests.ranks import run_ranks, run_ranks_with_log

FOUR = "--pipeline-model-parallel-size 4 --num-layers 8 --global-batch-size 16"
# the norm adds up squares rank by rank, and a rank has other layers here: with clipping the last bits differ
UNCLIPPED = "--clip-grad 0"


def run(world_size, *flags):
    """The losses that the last rank knows; by global name all values of a parameter, in order of rank.

    Equal values are one: replicas of data parallelism, and the copies of a tied embedding. What is left are the parts
    of tensor and expert parallelism, and whatever went wrong.
    """
    without = TIED if TIED in flags else ""
    ranks = run_ranks(world_size, trained, tiny(MODEL, *(flag for flag in flags if flag != TIED), without=without))
    values = defaultdict(list)
    for _, parameters in ranks:
        for name, value in parameters:
            if not any(torch.equal(value, known) for known in values[name]):
                values[name].append(value)
    return ranks[-1][0], dict(values)


@pytest.fixture(scope="module")
def on_loop():
    """Runs of Megatron's own drivers, by their flags, each made once."""
    return cache(run)


def assert_bit_equal(found, expected):
    (log, values), (other_log, other_values) = found, expected
    assert [step["loss"] for step in log] == [step["loss"] for step in other_log]
    assert values.keys() == other_values.keys()
    for name, parts in values.items():
        assert len(parts) == len(other_values[name]), name
        assert all(map(torch.equal, parts, other_values[name])), name
    for step, other in zip(log, other_log, strict=True):
        assert step["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["zb-v", "dualpipe-v"])
def test_four_ranks_train_as_interleaved(on_loop, schedule):
    assert_bit_equal(run(4, FOUR, UNCLIPPED, f"--pp-schedule {schedule}"), on_loop(4, FOUR, UNCLIPPED, CHUNKS))


# the last stage has the head only
LAYOUT = "--pipeline-model-parallel-layout Et|tt|t|L"
DISTRIBUTED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
COMBINED = {
    "tied embeddings, distributed optimizer": (4, "zb-v", (CHUNKS, TIED, DISTRIBUTED)),
    "tensor and sequence parallel, tied embeddings, loss per token": (
        4,
        "v-half",
        (CHUNKS, TIED, "--tensor-model-parallel-size 2 --sequence-parallel --calculate-per-token-loss"),
    ),
    "context parallel, experts": (4, "v-min", (CHUNKS, EXPERTS, "--context-parallel-size 2 --cp-comm-type zigzag")),
    "uneven stages, bf16": (2, "1f1b-v", (LAYOUT, "--bf16")),
}


CHOSEN = ["tensor and sequence parallel, tied embeddings, loss per token"]


@pytest.mark.parametrize("case", slow_unless(CHOSEN, COMBINED))
def test_combined_with_other_features_trains_as_interleaved(on_loop, case):
    world_size, schedule, flags = COMBINED[case]
    flags = (TWO, UNCLIPPED, "--train-iters 2", *flags)
    assert_bit_equal(run(world_size, *flags, f"--pp-schedule {schedule}"), on_loop(world_size, *flags))


@pytest.mark.slow
def test_clipped_gradients_differ_by_rounding_only(on_loop):
    (log, values), (other_log, other_values) = run(2, TWO, "--pp-schedule zb-v"), on_loop(2, TWO, CHUNKS)
    assert [step["loss"] for step in log] == pytest.approx([step["loss"] for step in other_log], rel=1e-6)
    for name, (value,) in values.items():
        torch.testing.assert_close(value, other_values[name][0], rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_fewer_microbatches_than_ranks_train_as_one_rank(on_loop):
    few = ("--global-batch-size 2", UNCLIPPED)
    assert_bit_equal(run(2, TWO, *few, "--pp-schedule zb-v"), on_loop(1, *few))


EVALUATED = ("--eval-interval 3 --eval-iters 2 --eval-global-batch-size 12", UNCLIPPED)


@pytest.mark.slow
def test_the_last_rank_prints_the_same_losses():
    printed = {}
    for name, flags in {"loop": CHUNKS, "v": "--pp-schedule zb-v"}.items():
        _, log = run_ranks_with_log(2, pretrain_losses, tiny(MODEL, TWO, *EVALUATED, flags))
        printed[name] = re.findall(r"lm loss(?: value)?: (\S+)", log)
    # iterations, and the evaluation at the end
    assert len(printed["loop"]) >= 4
    assert printed["v"] == printed["loop"]


def tied_weights_before_training(flags):
    """Whether this rank has both copies of a tied embedding, and they are equal and not zero, as Megatron starts."""
    from megatron_cp.megatron.pipeline import v_placement
    from megatron_cp.megatron.process import pretrain

    found = []
    sys.argv = ["pretrain_gpt", *flags]
    with launched(flags):
        pretrain.run(lambda config: config.pre_wrap_hooks.append(lambda models: found.append(v_placement.tied(models))))
    ((first, last),) = found if found[0] else ((None, None),)
    return None if first is None else (torch.equal(first, last), bool(first.any()))


def test_tied_embeddings_start_equal():
    flags = tiny(MODEL, TWO, "--train-iters 1 --pp-schedule zb-v", without=TIED)
    assert run_ranks(2, tied_weights_before_training, flags) == [(True, True), None]


STEPS = "--num-layers 4 --global-batch-size 8 --lr-decay-iters 6 --save-interval 2 --override-opt-param-scheduler"
RESHARDABLE = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"


@pytest.mark.slow
def test_checkpoints_move_between_schedules_and_placements(tmp_path: Path) -> None:
    flags = tiny(STEPS, TWO, RESHARDABLE)

    def steps(last: int, schedule: str, *more: str) -> list[dict]:
        return run_ranks(
            2, pretrain_losses, [*flags, *f"--train-iters {last} --pp-schedule {schedule}".split(), *more]
        )[0]

    first, second = str(tmp_path / "v"), str(tmp_path / "loop")
    unbroken = steps(6, "zb-v", "--save", first)
    (tmp_path / "v" / "latest_checkpointed_iteration.txt").write_text("2")
    found = steps(4, "1f1b", "--load", first)
    found += steps(4, f"interleaved {CHUNKS}", "--load", first, "--save", second)
    found += steps(6, "v-half", "--load", second)
    assert [step["iteration"] for step in found] == [3, 4, 3, 4, 5, 6]
    for ours, theirs in zip(found, unbroken[2:4] + unbroken[2:], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)


def moved(schedule):
    return SimpleNamespace(
        load="runs",
        pp_schedule=schedule,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        use_distributed_optimizer=True,
        dist_ckpt_optim_fully_reshardable=False,
    )


def test_optimizer_state_by_rank_does_not_move_between_placements():
    resume.check_optimizer(moved("v-half"), moved("zb-v"))
    with pytest.raises(ValueError, match=r"in runs cannot move between topologies \(placement v -> loop\); save with"):
        resume.check_optimizer(moved("izb"), moved("zb-v"))


HYBRID = f"--hybrid-layer-pattern *-|*-|*-|*- --num-layers 8 {TWO} --global-batch-size 8 --train-iters 3 {UNCLIPPED}"


def test_hybrid_model_trains_as_interleaved():
    hooked = ("flags", "checks", "schedule", "weight-queue", *hooks.FOR_V)
    _, loop = run_ranks_with_log(2, train, HYBRID, None, "hybrid_stack_spec")
    _, v = run_ranks_with_log(2, train, f"{HYBRID} --pp-schedule zb-v", None, "hybrid_stack_spec", hooked)
    assert len(losses(loop)) == 3
    assert (losses(v), grad_norms(v)) == (losses(loop), grad_norms(loop))


REFUSED = {
    "multi-token prediction": ("--mtp-num-layers 1", "zb-v does not do multi-token prediction"),
    "first rank": ("--decoder-first-pipeline-num-layers 1", "--pipeline-model-parallel-layout"),
    "last rank": ("--decoder-last-pipeline-num-layers 1", "--pipeline-model-parallel-layout"),
    "legacy checkpoint": ("--ckpt-format torch --save somewhere", "leave --ckpt-format out"),
    "chunks": (
        "--num-layers 8 --num-virtual-stages-per-pipeline-rank 4",
        "zb-v has 2 chunks per rank, got --num-virtual-stages-per-pipeline-rank 4",
    ),
    "layout": ("--pipeline-model-parallel-layout Ett|ttL", "zb-v has v = 2, got v = 1"),
}


def test_what_the_v_cannot_do_is_refused_in_one_line():
    cases = {name: tiny(MODEL, TWO, "--pp-schedule zb-v", flags) for name, (flags, _) in REFUSED.items()}
    (lines,) = run_ranks(1, refusal, cases)
    for name, (_, text) in REFUSED.items():
        assert text in lines[name], name
        assert "\n" not in lines[name]
