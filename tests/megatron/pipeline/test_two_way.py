"""Two copies of the model on the ranks of one pipeline train as one: Megatron's own 1F1B."""

import sys
from collections import defaultdict
from contextlib import nullcontext
from functools import cache
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_cp.megatron.arguments.pipeline import WHOLE_STAGE, imply_buckets
from megatron_cp.megatron.process.launch import launched
from tests.cases import slow_unless
from tests.megatron.pipeline.test_schedules import EXPERTS, MODEL, TIED, TWO, refusal
from tests.megatron.pretraining import noting, pretrain_losses, tiny, trained
from tests.ranks import run_ranks

FOUR = "--pipeline-model-parallel-size 4 --num-layers 8 --global-batch-size 16"
# one microbatch in each pipe
LEAST = "--global-batch-size 4"


def run(world_size, *flags):
    """The losses that the last rank knows; by global name the values of a parameter that differ."""
    without = TIED if TIED in flags else ""
    ranks = run_ranks(world_size, trained, tiny(MODEL, *(flag for flag in flags if flag != TIED), without=without))
    values = defaultdict(list)
    for _, parameters in ranks:
        for name, value in parameters:
            if not any(torch.equal(value, known) for known in values[name]):
                values[name].append(value)
    return ranks[-1][0], dict(values)


@pytest.fixture(scope="module")
def one_copy():
    """Runs of Megatron's own drivers, by their flags, each made once."""
    return cache(run)


def assert_equal_but_for_rounding(found, expected):
    (log, values), (other_log, other_values) = found, expected
    for key in ("loss", "grad_norm"):
        assert [step[key] for step in log] == pytest.approx([step[key] for step in other_log], rel=1e-5)
    assert values.keys() == other_values.keys()
    for name, parts in values.items():
        # the copies are equal bit for bit, or there would be more
        assert len(parts) == len(other_values[name]), name
        for part, other in zip(parts, other_values[name], strict=True):
            torch.testing.assert_close(part, other, rtol=1e-4, atol=1e-5)


EXACT = {"chimera in bf16": ("chimera", "--bf16"), "chimera-zb, tied embeddings": ("chimera-zb", TIED)}


@pytest.mark.parametrize("case", slow_unless(["chimera-zb, tied embeddings"], list(EXACT)))
def test_one_microbatch_in_each_pipe_trains_as_1f1b_bit_for_bit(one_copy, case):
    schedule, more = EXACT[case]
    log, values = run(2, TWO, LEAST, more, f"--pp-schedule {schedule}")
    other_log, other_values = one_copy(2, TWO, LEAST, more)
    assert log == other_log
    assert values.keys() == other_values.keys()
    for name, parts in values.items():
        assert [torch.equal(*pair) for pair in zip(parts, other_values[name], strict=True)] == [True], name


COMBINED = {
    "four ranks": (4, "dualpipe", (FOUR, "--global-batch-size 20")),
    "tensor and sequence parallel, loss per token, tied embeddings": (
        4,
        "chimera",
        (TWO, TIED, "--tensor-model-parallel-size 2 --sequence-parallel --calculate-per-token-loss"),
    ),
    "expert parallel, reductions overlapped": (
        4,
        "chimera-zb",
        (TWO, EXPERTS, "--expert-model-parallel-size 2 --overlap-grad-reduce --global-batch-size 16"),
    ),
    "context parallel, distributed optimizer in bf16, tied embeddings": (
        4,
        "chimera",
        (
            TWO,
            TIED,
            "--context-parallel-size 2 --cp-comm-type zigzag --bf16",
            "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", COMBINED)
def test_combined_with_other_features_trains_as_1f1b(one_copy, case):
    world_size, schedule, flags = COMBINED[case]
    assert_equal_but_for_rounding(run(world_size, *flags, f"--pp-schedule {schedule}"), one_copy(world_size, *flags))


def with_evaluation(flags):
    """This rank's losses of each evaluation, and of each step."""
    from megatron_cp.megatron.rebind import replace, restore

    found = []
    done = replace("megatron.training.training:evaluate", lambda evaluate: noting(evaluate, found))
    try:
        return pretrain_losses(flags), found
    finally:
        restore(done)


@pytest.mark.slow
def test_evaluation_gives_the_same_loss():
    flags = tiny(MODEL, TWO, "--eval-interval 3 --eval-iters 2 --eval-global-batch-size 12")
    ours, theirs = (run_ranks(2, with_evaluation, [*flags, *more])[1] for more in (["--pp-schedule", "chimera"], []))
    assert len(ours[1]) == len(theirs[1]) > 0
    for found, expected in zip(ours[1], theirs[1], strict=True):
        assert found == pytest.approx(expected, rel=1e-6)


def weights_before_training(flags):
    """Sums over the weights of this rank's two stages, as Megatron draws them."""
    from megatron_cp.megatron.process import pretrain

    found = []
    sys.argv = ["pretrain_gpt", *flags]
    with launched(flags):
        pretrain.run(
            lambda config: config.pre_wrap_hooks.append(
                lambda models: found.extend([w.detach().clone() for w in model.parameters()] for model in models)
            )
        )
    return found


def test_both_copies_start_equal():
    first, last = run_ranks(2, weights_before_training, tiny(MODEL, TWO, "--train-iters 1 --pp-schedule chimera"))
    for down, up in ((first[0], last[1]), (last[0], first[1])):
        assert len(down) == len(up) > 1
        assert all(map(torch.equal, down, up))
    assert not torch.equal(first[0][-1], last[0][-1])


SHARDED = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"


@pytest.mark.slow
def test_checkpoints_move_between_one_copy_and_two(tmp_path: Path):
    def steps(last: int, *more: str) -> list[dict]:
        saving = "--lr-decay-iters 6 --save-interval 2 --override-opt-param-scheduler"
        flags = tiny(MODEL, TWO, saving, SHARDED, *more, without=TIED)
        return run_ranks(2, pretrain_losses, [*flags, "--train-iters", str(last)])[0]

    two, first, second = "--pp-schedule chimera", tmp_path / "two", tmp_path / "one"
    unbroken = steps(6, two, f"--save {first}")
    (first / "latest_checkpointed_iteration.txt").write_text("2")
    found = steps(4, f"--load {first} --save {second}")
    found += steps(6, two, f"--load {second}")
    assert [step["iteration"] for step in found] == [3, 4, 5, 6]
    for ours, theirs in zip(found, unbroken[2:], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)


def test_peers_have_the_same_shards_of_a_stage():
    # Megatron cuts the first rank's gradients into buckets, and no other rank's
    for schedule, size in (("chimera", WHOLE_STAGE), ("zb-h1", None)):
        args = SimpleNamespace(pp_schedule=schedule, use_distributed_optimizer=True, ddp_bucket_size=None)
        imply_buckets(args)
        assert args.ddp_bucket_size == size


REFUSED = {
    "buckets": (
        "--use-distributed-optimizer --ddp-num-buckets 2",
        "leave --ddp-num-buckets and --ddp-bucket-size out, or take zb-v",
    ),
    "odd batch": ("--global-batch-size 12", "got m = 3; take 4"),
    "odd evaluation": (
        "--eval-iters 1 --eval-global-batch-size 12",
        "got 3 in an evaluation (--eval-global-batch-size 12); take an even number of them",
    ),
    "chunks": ("--num-virtual-stages-per-pipeline-rank 2", "chimera has 1 chunk per rank, got"),
    "multi-token prediction": ("--mtp-num-layers 1", "chimera does not do multi-token prediction"),
    "islands": ("--use-distributed-optimizer --local-sgd-steps 2", "leave --local-sgd-steps out, or take zb-v"),
    "moves": ("--pp-offload 2", "chimera does not do activations that move"),
    "legacy checkpoint": ("--ckpt-format torch --save somewhere", "leave --ckpt-format out"),
}


def test_what_two_copies_cannot_do_is_refused_in_one_line():
    cases = {name: tiny(MODEL, TWO, "--pp-schedule chimera", flags) for name, (flags, _) in REFUSED.items()}
    (lines,) = run_ranks(1, refusal, cases)
    for name, (_, text) in REFUSED.items():
        assert text in lines[name], (name, lines[name])
        assert "\n" not in lines[name]


@pytest.mark.parametrize("plans", [False, True], ids=["alone", "plans"])
def test_quantised_weights_are_made_anew_in_the_first_microbatch_of_both_pipes(monkeypatch, plans):
    from megatron.core.pipeline_parallel import combined_1f1b, schedules

    from megatron_cp.megatron.pipeline import combined
    from megatron_cp.megatron.pipeline.stages import Call, ModelStages
    from megatron_cp.megatron.pipeline.two_way import TwoWay

    module, name = (combined_1f1b, "combined_forward_backward_step") if plans else (schedules, "forward_step")
    known, anew = signature(getattr(module, name)), []

    def step(*args, **kwargs):
        given = known.bind(*args, **kwargs).arguments
        if given["is_first_microbatch"]:
            anew.append(given["current_microbatch"])
        return (torch.zeros(1), 0, None) if plans else (torch.zeros(1), 0)

    monkeypatch.setattr(module, name, step)
    monkeypatch.setattr(combined, "set_streams", lambda **_: None)
    monkeypatch.setattr(TwoWay, "seen", lambda *_: nullcontext())
    call = Call(
        forward_step_func=lambda **_: None,
        data_iterator=[None, None],
        model=[None, None],
        micros=6,
        config=SimpleNamespace(
            num_microbatches_with_partial_activation_checkpoints=None,
            param_sync_func=None,
            high_priority_a2a_comm_stream=False,
        ),
        groups=SimpleNamespace(cp=SimpleNamespace(size=lambda: 1)),
        shape=(),
        tokens_of=None,
        training=True,
        collect_non_loss_data=False,
        first_val_step=None,
        force_all_reduce=False,
        tokens=torch.zeros([], dtype=torch.int),
    )
    kind = combined.CombinedStages if plans else ModelStages
    stages = kind(call, TwoWay(), (0, 3), lambda stage: False, None)
    for stage, micro in [(0, 0), (3, 3), (0, 1), (3, 4), (0, 2), (3, 5)]:
        stages.forward(stage, micro, None)
    assert anew == [0, 3]
