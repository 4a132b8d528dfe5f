"""Weights in versions during real pretraining: the bits of Megatron's own driver on the weights of earlier updates."""

import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megatron_cp.megatron.arguments.pipeline import check_schedule
from megatron_cp.megatron.rebind import replace, restore
from megatron_cp.pipeline import SCHEDULES
from tests.megatron import pretraining
from tests.megatron.pipeline.test_schedules import refusal
from tests.megatron.pretraining import tiny
from tests.ranks import run_ranks, run_ranks_with_log

LAYERS = 4
MODEL = f"--num-layers {LAYERS} --train-iters 5 --rerun-mode disabled"
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
TWO = "--pipeline-model-parallel-size 2"
EVALUATION = "--eval-interval 2 --eval-iters 2"


class Late:
    """Megatron's own forward-backward function, with each stage's parameters as they were some updates before."""

    def __init__(self, stock, behind):
        self._stock, self._behind, self._history = stock, behind, []

    def __call__(self, **given):
        if given.get("forward_only"):
            return self._stock(**given)
        model = given["model"] if isinstance(given["model"], list) else [given["model"]]
        named = [pair for chunk in model for pair in pretraining.global_names(unwrapped(chunk))]
        now = [weight.data for _, weight in named]
        self._history.append([values.clone() for values in now])
        for place, (name, weight) in enumerate(named):
            weight.data = self._history[max(len(self._history) - 1 - self._behind(name), 0)][place].clone()
        result = self._stock(**given)
        for (_, weight), values in zip(named, now, strict=True):
            weight.data = values
        return result


def unwrapped(chunk):
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def late(flags, behind):
    """Train with Megatron's own schedule, flushed every step, on weights that lack as many updates on each stage."""

    def of_stage(name):
        layer = re.match(r"decoder\.layers\.(\d+)", name)
        if layer:
            return behind[int(layer[1]) * len(behind) // LAYERS]
        return behind[0 if name.startswith("embedding") else -1]

    made = []

    def getter(old):
        def get(*args, **kwargs):
            if not made:
                made.append(Late(old(*args, **kwargs), of_stage))
            return made[0]

        return get

    done = replace("megatron.training.training:get_forward_backward_func", getter)
    try:
        log, parameters = pretraining.trained(flags)
    finally:
        restore(done)
    assert made, "the test double has not run"
    return log, dict(parameters)


def ours(flags):
    """Losses and parameters, and per step the versions of weights and the forwards in flight."""
    ends = []

    def noting(old):
        class Noted(old):
            def end(self, executor):
                super().end(executor)
                ends.append((self.versions.kept, len(self.carried.made)))

        return Noted

    done = replace("megatron_cp.megatron.pipeline.schedule:WithoutFlush", noting)
    try:
        log, parameters = pretraining.trained(flags)
    finally:
        restore(done)
    return log, dict(parameters), ends


def run(world, function, *args):
    ranks = run_ranks(world, function, *args)
    log = next(found[0] for found in ranks if found[0][0]["loss"] is not None)
    return log, [found[1] for found in ranks], [found[2:] for found in ranks]


def assert_bit_equal(found, expected):
    assert found[0] == expected[0]
    for mine, theirs in zip(found[1], expected[1], strict=True):
        assert list(mine) == list(theirs)
        assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def assert_late(name, p, batch, *flags, world=None, steps=5, saved=""):
    """Runs equal the test double's, bit for bit, and keep the versions and graphs that the schedule says."""
    words = (MODEL, f"--pipeline-model-parallel-size {p} --global-batch-size {batch}", *flags)
    m = batch // 2 * p // (world or p)
    delay = SCHEDULES.get(name).delay(p, m)
    found = run(world or p, ours, tiny(*words, f"--pp-schedule {name}", saved))
    assert_bit_equal(found, run(world or p, late, tiny(*words), delay.behind))
    copies = (world or p) // p
    for rank, (ends,) in enumerate(found[2]):
        stage = rank // copies
        for step, (kept, in_flight) in enumerate(ends, 1):
            assert kept == tuple(range(max(step - delay.behind[stage], 0), step + 1))
            assert in_flight == min(delay.ahead[stage], (steps - step) * m)
    assert max(len(kept) for kept, _ in found[2][0][0]) == delay.versions[0]
    return found


def test_two_versions_train_as_megatron_on_weights_of_one_update_before():
    assert_late("2bw", 2, 8, "--train-iters 3", RECOMPUTE, EVALUATION, steps=3)


@pytest.mark.slow
def test_late_weights_part_from_flushed_steps_after_the_first_loss():
    words = (MODEL, TWO, "--global-batch-size 8 --train-iters 3")
    (late_log, *_), (flushed, *_) = run(2, ours, tiny(*words, "--pp-schedule 2bw")), run(2, ours, tiny(*words))
    same = [mine["loss"] == other["loss"] for mine, other in zip(late_log, flushed, strict=True)]
    # the second batch still runs on the first weights
    assert same == [True, False, False]


@pytest.mark.slow
def test_four_stages_train_as_megatron_on_earlier_weights():
    assert_late("2bw", 4, 6)


@pytest.mark.slow
def test_two_pipelines_train_as_megatron_on_earlier_weights():
    assert_late("2bw", 2, 8, "--bf16 --use-distributed-optimizer --overlap-grad-reduce", world=4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "--context-parallel-size 2 --cp-comm-type zigzag --calculate-per-token-loss "
        "--num-experts 4 --moe-router-topk 2 --moe-aux-loss-coeff 0.01",
        "--tensor-model-parallel-size 2 --sequence-parallel --bf16",
    ],
)
def test_other_parallelism_trains_as_megatron_on_earlier_weights(flags):
    found = run(4, ours, tiny(MODEL, TWO, flags, "--pp-schedule 2bw"))
    assert_bit_equal(found, run(4, late, tiny(MODEL, TWO, flags), (1, 1)))


def resumed(folder, name, p, at, batch, *flags):
    """A run of five steps on earlier weights that saved after step `at`, and one that goes on from there."""
    whole = assert_late(name, p, batch, *flags, saved=f"--save {folder} --save-interval {at}")
    (Path(folder) / "latest_checkpointed_iteration.txt").write_text(str(at))
    words = (MODEL, f"--pipeline-model-parallel-size {p} --global-batch-size {batch}", *flags, f"--pp-schedule {name}")
    ranks, said = run_ranks_with_log(p, ours, tiny(*words, f"--load {folder}"))
    log = next(found[0] for found in ranks if found[0][0]["loss"] is not None)
    again = (log, [found[1] for found in ranks])
    assert_bit_equal((whole[0][at:], whole[1]), again)
    return again, said


@pytest.mark.slow
def test_resumed_run_equals_the_whole_one(tmp_path):
    buffers = "--bf16 --use-distributed-optimizer"
    again, said = resumed(tmp_path, "2bw", 2, 3, 8, buffers)
    assert f"earlier weights from {tmp_path}/iter_0000003" in said
    # another schedule takes the newest weights alone, and without the earlier ones training goes on
    once = (MODEL, TWO, buffers, "--global-batch-size 8 --override-opt-param-scheduler")
    saves = f"--save {tmp_path}/1f1b --save-interval 9 --train-iters 4"
    plain, *_ = run(2, ours, tiny(*once, f"--pp-schedule 1f1b --load {tmp_path}", saves))
    assert [step["iteration"] for step in plain] == [4]
    assert plain[0]["loss"] != again[0][0]["loss"]
    ranks, said = run_ranks_with_log(2, ours, tiny(*once, f"--pp-schedule 2bw --load {tmp_path}/1f1b"))
    assert [step["iteration"] for step in ranks[0][0]] == [5]
    assert "1f1b has no earlier weights: the first batches run on those of iteration 4" in said


@pytest.mark.slow
@pytest.mark.parametrize(("name", "batch", "at"), [("pipedream", 2, 4), ("pipedream-vertical", 4, 2)])
def test_many_versions_train_as_megatron_on_earlier_weights_and_are_resumed(tmp_path, name, batch, at):
    resumed(tmp_path, name, 4, at, batch)


REFUSED = {
    "rerun": ("--rerun-mode validate_results", "pass --rerun-mode disabled"),
    "float32": ("--use-distributed-optimizer", "pass --bf16, or leave --use-distributed-optimizer out"),
    "gather": (
        "--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
        "leave --overlap-param",
    ),
    "bias": ("--num-experts 4 --moe-router-enable-expert-bias", "leave --moe-router-enable-expert-bias and quantile_"),
    "ramp": ("--rampup-batch-size 4 4 32", "leave --rampup-batch-size and --step-batch-size-schedule out"),
    "skip": ("--iterations-to-skip 3", "leave --iterations-to-skip out"),
    "optimizer": ("--optimizer muon", "take --optimizer adam or sgd"),
    "instances": ("--num-distributed-optimizer-instances 2", "take one --num-distributed-optimizer-instances"),
    "legacy": ("--ckpt-format torch --save somewhere", "leave --ckpt-format and --non-persistent-ckpt-type local out"),
    "few": ("--pipeline-model-parallel-size 4 --global-batch-size 4", "2bw needs m of at least p - 1 = 3"),
    "slices": ("--pp-slices 2", "2bw has no order for 2 slices"),
    "offload": ("--pp-offload 2", "leave --pp-offload out, or take it with 1f1b"),
    "chunks": ("--num-virtual-stages-per-pipeline-rank 2", "2bw has 1 chunk per rank, got"),
}


def test_what_versions_cannot_do_is_refused_in_one_line():
    cases = {name: tiny(MODEL, TWO, "--pp-schedule 2bw", flags) for name, (flags, _) in REFUSED.items()}
    (lines,) = run_ranks(1, refusal, cases)
    for name, (_, text) in REFUSED.items():
        assert text in lines[name], (name, lines[name])
        assert "\n" not in lines[name]


@pytest.mark.parametrize(
    ("asked", "way_out"),
    [
        ({"fp8": "e4m3"}, "leave --fp8-format and --fp4-format out"),
        ({"use_precision_aware_optimizer": True}, "without --use-precision-aware-optimizer"),
        ({"nccl_ub": True}, "leave --use-nccl-ub out"),
        ({"moe_placement": "lina"}, "leave --moe-placement out"),
        ({"moe_router_load_balancing_type": "quantile_balancing"}, "leave .* and quantile_balancing out"),
        ({"gtp_weight_remat_size": 2}, "every rank its weights whole"),
    ],
)
def test_what_a_machine_without_a_gpu_leaves_out_is_refused(asked, way_out):
    with pytest.raises(ValueError, match=way_out):
        check_schedule(Namespace(pp_schedule="2bw", pipeline_model_parallel_size=2, **asked))
