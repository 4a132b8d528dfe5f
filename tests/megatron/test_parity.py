"""The real pretrain() gives the same losses and gradient norms however the sequence is cut and what else is sharded."""

import os
import re

import pytest

from megatron_cp.context import BACKENDS
from megatron_cp.context.latent import LATENT_TRAFFIC
from megatron_cp.context.traffic import LocalSizes
from megatron_cp.recipe import recipe
from megatron_cp.recipe.command import flag_words
from tests.cases import slow_unless
from tests.megatron.pretraining import pretrain_losses, tiny
from tests.ranks import RankError, run_ranks, run_ranks_with_log
from tests.tolerances import BF16_LOSS, GRAD_NORM_DIGITS, LOSS_DIGITS

# startrail takes teams whose square divides the ranks
GRID = {2: "1 2", 4: "2 2"}


def losses(world_size, *flags):
    return run_ranks(world_size, pretrain_losses, tiny(*flags))[0]


def context(backend, size):
    """Flags of a backend, or of one for each layer in turn."""
    needed = any(BACKENDS.get(name).needs_grid for name in backend.split())
    grid = f"--hierarchical-context-parallel-sizes {GRID[size]}" if needed else ""
    return f"--context-parallel-size {size} --cp-comm-type {backend} {grid}"


def assert_equal_runs(found, expected, steps=4):
    assert [step["iteration"] for step in found] == list(range(1, steps + 1))
    for step, other in zip(found, expected, strict=True):
        assert step["loss"] == pytest.approx(other["loss"], rel=10**-LOSS_DIGITS)
        assert step["grad_norm"] == pytest.approx(other["grad_norm"], rel=10**-GRAD_NORM_DIGITS)


@pytest.fixture(scope="module")
def alone():
    """Runs on one rank, by their flags, each made once."""
    runs = {}

    def run(*flags):
        if flags not in runs:
            runs[flags] = losses(1, *flags)
        return runs[flags]

    return run


def test_losses_fall(alone):
    run = alone()
    assert run[-1]["loss"] < run[0]["loss"]


# one of each way into the adapter: blocks that travel, heads that are split, both on a grid, chunks, auto
ONE_WAY = ("zigzag", "ulysses", "usp", "fpdt", "auto")


def layers_of(backends, size):
    """Flags of a model with a layer of each backend on this many ranks, and of the same model on one."""
    model = f"--num-layers {len(backends)}"
    return f"{context(' '.join(backends), size)} {model}", model


@pytest.mark.parametrize(
    ("backends", "size"), slow_unless([(ONE_WAY, 4)], [(ONE_WAY, 4), *((BACKENDS.names, size) for size in (2, 4))])
)
def test_context_parallel_equals_one_rank(alone, backends, size):
    flags, model = layers_of(backends, size)
    assert_equal_runs(losses(size, flags), alone(model))


TENSOR = "--tensor-model-parallel-size 2 --sequence-parallel"
PIPELINE = "--pipeline-model-parallel-size 2"
OPTIMIZER = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
RECOMPUTED = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
# tensor and expert parallelism are trained in test_entry_points, recomputation in test_recompute
COMBINED = [(PIPELINE, ""), (OPTIMIZER, "--normalization LayerNorm")]


@pytest.mark.parametrize(("parallel", "model"), slow_unless([COMBINED[0]], COMBINED))
def test_combined_with_other_parallelism_equals_one_rank(alone, parallel, model):
    assert_equal_runs(losses(4, context("zigzag", 2), parallel, model), alone(model))


PREDICTIONS = {
    "one layer": (2, "", "--mtp-num-layers 1"),
    "two layers, per-token loss": (4, "--context-parallel-size 4", "--mtp-num-layers 2 --calculate-per-token-loss"),
    "tensor and sequence parallel, distributed optimizer": (
        4,
        f"{TENSOR} --use-distributed-optimizer",
        "--mtp-num-layers 1",
    ),
    "pipeline": (4, f"{PIPELINE} --pp-schedule zb-h1", "--mtp-num-layers 1"),
}


def losses_over_the_whole_sequence(flags):
    """Losses, and how often ours weighted those of a layer of multi-token prediction."""
    from megatron_cp.megatron.layers import mtp_loss
    from megatron_cp.megatron.rebind import replace, restore

    calls = []
    counted = replace(
        f"{mtp_loss.__name__}:roll_tensor", lambda old: lambda *args, **kwargs: calls.append(1) or old(*args, **kwargs)
    )
    try:
        return pretrain_losses(flags), len(calls)
    finally:
        restore(counted)


@pytest.mark.parametrize("case", slow_unless(["one layer"], PREDICTIONS))
def test_multi_token_prediction_equals_one_rank(alone, case):
    world_size, parallel, model = PREDICTIONS[case]
    ranks = run_ranks(world_size, losses_over_the_whole_sequence, tiny(context("zigzag", 2), parallel, model))
    assert_equal_runs(ranks[0][0], alone(model))
    assert ranks[-1][1] > 0, "the last pipeline stage has these layers"


@pytest.mark.slow
def test_bf16_trains_as_one_rank_does(alone):
    flags, model = layers_of(BACKENDS.names, 2)
    found, expected = losses(2, flags, "--bf16"), alone(model, "--bf16")
    for step, other in zip(found, expected, strict=True):
        assert step["loss"] == pytest.approx(other["loss"], rel=BF16_LOSS)
    assert found[-1]["loss"] < found[0]["loss"]


@pytest.mark.slow
def test_a_placement_and_stripes_of_several_tokens_equal_one_rank(alone):
    flags = f"{context('usp striped', 4)} --cp-placement context-first --cp-stripe 2"
    assert_equal_runs(losses(4, flags), alone())


@pytest.mark.slow
def test_sliding_window_equals_stock_attention_on_one_rank(alone):
    flags, model = layers_of(BACKENDS.names, 2)
    # the last layer sees everything
    window = f"--window-size 8,0 --window-attn-skip-freq {len(BACKENDS.names)}"
    assert_equal_runs(losses(2, flags, window), alone(model, window))


def losses_after_a_check(flags, wrong):
    """The losses of a run that checks itself, where the kernel of the last rank is a thousandth off if `wrong`."""
    from megatron_cp.kernels.fused import FusedKernel

    if wrong and os.environ["RANK"] == "1":
        forward = FusedKernel.forward

        def off(self, *args, **choices):
            out, lse = forward(self, *args, **choices)
            return out * 1.001, lse

        FusedKernel.forward = off
    return pretrain_losses(flags)


@pytest.mark.slow
def test_a_run_checks_itself_and_trains_as_without(alone):
    flags = context("zigzag", 2)
    found, log = run_ranks_with_log(2, losses_after_a_check, tiny(flags, "--cp-self-check"), False)
    assert log.count("[megatron-cp] self-check of zigzag, kernel torch: ") == 1
    assert_equal_runs(found[0], alone())
    with pytest.raises(RankError) as wrong:
        run_ranks(2, losses_after_a_check, tiny(flags, "--cp-self-check"), True)
    lines = {text.partition("--cp-self-check: ")[2].splitlines()[0] for text in wrong.value.errors.values()}
    assert len(wrong.value.errors) == 2
    (line,) = lines
    assert re.match("(out|d[qkv]) of zigzag, kernel torch on rank 1 is wrong by [4-9].*e-04 of its largest value", line)


ALIBI = "--cp-alibi --position-embedding-type none"
WITH_ALIBI = {
    "heads, tensor and sequence parallel": (
        4,
        f"{context('ulysses all-gather', 2)} {TENSOR}",
    ),
    "pipeline, recomputed": (
        4,
        f"{context('zigzag', 2)} {PIPELINE} --pp-schedule 1f1b {RECOMPUTED}",
    ),
}


def losses_and_biases(flags):
    """The losses of a run, and how often queries and keys got columns of positions on this rank."""
    from megatron_cp.context import function

    calls, widened = [], function.with_positions
    function.with_positions = lambda *args: calls.append(1) or widened(*args)
    return pretrain_losses(flags), len(calls)


@pytest.mark.slow
@pytest.mark.parametrize("case", WITH_ALIBI)
def test_alibi_equals_one_rank(alone, case):
    size, flags = WITH_ALIBI[case]
    found = run_ranks(size, losses_and_biases, tiny(flags, ALIBI))
    assert all(calls > 0 for _, calls in found)
    assert_equal_runs(found[0][0], alone(ALIBI))
    assert alone(ALIBI)[0]["loss"] != alone("--position-embedding-type none")[0]["loss"]


DROPPED = "--attention-dropout 0.3 --cp-kernel reference"
DROPPING = {
    "heads, recomputed": (
        2,
        f"{context('ulysses', 2)} {RECOMPUTED}",
    ),
    "tensor and sequence parallel": (
        4,
        f"{context('zigzag all-gather', 2)} {TENSOR}",
    ),
}


def losses_and_drops(flags):
    """The losses of a run, and how often weights were dropped on this rank."""
    from megatron_cp.kernels import reference

    calls, kept = [], reference.kept
    reference.kept = lambda *args: calls.append(1) or kept(*args)
    return pretrain_losses(flags), len(calls)


@pytest.mark.slow
@pytest.mark.parametrize("case", DROPPING)
def test_dropped_weights_are_those_of_one_rank(alone, case):
    size, flags = DROPPING[case]
    found = run_ranks(size, losses_and_drops, tiny(flags, DROPPED))
    assert all(calls > 0 for _, calls in found)
    assert_equal_runs(found[0][0], alone(DROPPED))
    assert alone(DROPPED)[0]["loss"] != alone()[0]["loss"]


# every second layer sees a window, as in gpt-oss
SINKS = "--softmax-type learnable --window-size 8,0 --window-attn-skip-freq 2"


def losses_and_sinks(flags):
    """The losses of a run, and how often a sink was merged on this rank."""
    from megatron_cp.context import sinks

    calls, merged = [], sinks.merged
    sinks.merged = lambda *rows: calls.append(1) or merged(*rows)
    return pretrain_losses(flags), len(calls)


def assert_sinks_train(alone, size, *flags, model=SINKS):
    found = run_ranks(size, losses_and_sinks, tiny(*flags, model))
    assert all(calls > 0 for _, calls in found)
    assert_equal_runs(found[0][0], alone(model))


def test_learned_sinks_equal_stock_attention_on_one_rank(alone):
    assert_sinks_train(alone, 2, context("ulysses", 2))


@pytest.mark.slow
def test_learned_sinks_of_layers_of_several_backends_equal_one_rank(alone):
    # of each two layers one sees a window
    backends = " ".join(f"{name} {name}" for name in ("zigzag", "fpdt", "usp", "all-gather", "rsa"))
    assert_sinks_train(alone, 4, context(backends, 4), model=f"{SINKS} --num-layers 10")


@pytest.mark.slow
@pytest.mark.parametrize(("model", "size"), [("--softmax-type off-by-one", 2), ("--cp-sink 0.0", 4)])
def test_off_by_one_equals_stock_attention_on_one_rank(alone, model, size):
    found = run_ranks(size, losses_and_sinks, tiny(context("zigzag", size), model))
    assert all(calls > 0 for _, calls in found)
    assert_equal_runs(found[0][0], alone("--softmax-type off-by-one"))


@pytest.mark.slow
def test_learned_sinks_beside_other_parallelism_equal_one_rank(alone):
    assert_sinks_train(alone, 4, context("zigzag", 2), TENSOR, OPTIMIZER, RECOMPUTED)


@pytest.mark.slow
def test_learned_sinks_in_a_schedule_of_ours_equal_one_rank(alone):
    assert_sinks_train(alone, 4, context("zigzag", 2), f"{PIPELINE} --pp-schedule zb-h1")


# keys of 8 + 4, values of 8
LATENT = (
    "--multi-latent-attention --q-lora-rank 16 --kv-lora-rank 16 --qk-head-dim 8 --qk-pos-emb-head-dim 4 "
    "--v-head-dim 8 --rope-type rope"
)


def losses_and_value_dims(flags):
    """The losses of a run, and the head dims of keys and values that our attention was given on this rank."""
    from megatron_cp.megatron.layers import attention

    dims, attend = set(), attention.attend

    def noted(q, k, v, *rest, **options):
        dims.add((k.shape[3], v.shape[3]))
        return attend(q, k, v, *rest, **options)

    attention.attend = noted
    return pretrain_losses(flags), dims


def latent(*flags):
    words = tiny(*flags, LATENT, without="--group-query-attention")
    # a head of its own for every query head
    at = words.index("--num-query-groups")
    return words[:at] + words[at + 2 :]


def latent_losses(size, *flags):
    found = run_ranks(size, losses_and_value_dims, latent(*flags))
    assert [dims for _, dims in found] == [{(12, 8)}] * size
    return found[0][0]


@pytest.fixture(scope="module")
def latent_alone():
    return latent_losses(1, "--cp-comm-type p2p")


# zigzag is among MODELS, all-gather in test_packed.py
@pytest.mark.slow
def test_multi_latent_attention_equals_one_rank(latent_alone):
    assert_equal_runs(latent_losses(4, context("ulysses fpdt", 4)), latent_alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        f"{context('zigzag', 2)} {PIPELINE}",
        f"{context('striped ring', 2)} {OPTIMIZER} {RECOMPUTED} --cp-keep-attention",
    ],
    ids=["pipeline", "distributed optimizer, recomputed"],
)
def test_latents_beside_other_parallelism_equal_one_rank(latent_alone, flags):
    losses, sent = travelling(4, flags)
    assert all(sent), "no attention of ours sent latents"
    assert_equal_runs(losses, latent_alone)


def losses_and_latents(flags):
    """The losses of a run, and how many bytes the calls of our attention that take latents sent on this rank."""
    from megatron_cp.megatron.layers import attention

    plans, attend = {}, attention.attend_latent

    def noted(q, latent, up, plan, **options):
        assert (latent.shape[2], up.shape) == (20, (4, 16, 16))
        plans[id(plan)] = plan
        return attend(q, latent, up, plan, **options)

    attention.attend_latent = noted
    return pretrain_losses(flags), sum(plan.sent for plan in plans.values())


def travelling(size, *flags):
    """The losses of a run whose latents travel, and the bytes that each rank sent."""
    ranks = run_ranks(size, losses_and_latents, latent("--cp-latent", *flags))
    return ranks[0][0], [sent for _, sent in ranks]


def test_latents_that_travel_train_as_on_one_rank(latent_alone):
    losses, sent = travelling(2, context("zigzag", 2))
    assert_equal_runs(losses, latent_alone)
    # of two layers, four steps and four samples of 16 tokens a rank, r + p = 20; ranks agree by a few bytes at first
    passes = [
        LATENT_TRAFFIC.elements(LocalSizes(2, 16, 1, 4, 1, 20), causal=True, backward=way) for way in (False, True)
    ]
    assert sum(sent) / 2 == pytest.approx(2 * 4 * 4 * sum(each.size(4, 4) for each in passes), rel=1e-3)


EXPERTS = "--num-experts 4 --moe-router-topk 2 --moe-aux-loss-coeff 0 --moe-token-dispatcher-type"
SHARED = "--expert-model-parallel-size 2"

# HybridModel's patterns are in layers/test_hybrid.py
MODELS = {
    "dense": ("", "", tiny),
    # Adam's first step is the sign of a gradient, and some gradients of these norms are 0 but for rounding
    "experts, all-to-all; q and k layernorm": (
        SHARED,
        f"{EXPERTS} alltoall --qk-layernorm --adam-eps 1e-5",
        tiny,
    ),
    "experts, all-gather; windows on some layers": (
        SHARED,
        f"{EXPERTS} allgather --window-size 8,0 --window-attn-skip-freq 2",
        tiny,
    ),
    "multi-token prediction": ("", "--mtp-num-layers 1 --calculate-per-token-loss", tiny),
    "latent attention": ("", "", latent),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", MODELS)
def test_models_on_four_ranks_equal_one_rank_over_five_steps(case):
    parallel, model, words = MODELS[case]
    flags = (model, "--train-iters 5")
    ranks = run_ranks(4, losses_and_value_dims, words(context("zigzag", 4), parallel, *flags))
    assert all(dims for _, dims in ranks)
    expected = run_ranks(1, pretrain_losses, words("--cp-comm-type p2p", *flags))[0]
    assert_equal_runs(ranks[0][0], expected, steps=5)


# the preset as it is, but for the corpus, shorter sequences and fewer of them
GPT_OSS = (
    "--mock-data --split=false --save=false --save-interval=false --seq-length 192 --micro-batch-size 2 "
    "--global-batch-size 2 --train-iters 5 --lr-warmup-iters 1"
)


@pytest.mark.slow
def test_the_preset_in_the_style_of_gpt_oss_trains_as_on_one_rank():
    runs = []
    for size in (1, 2):
        run = recipe.load("quickstart-sinks", {}, [*GPT_OSS.split(), "--context-parallel-size", str(size)])
        found = run_ranks(size, losses_and_sinks, flag_words(run.model_args))
        assert size == 1 or all(calls > 0 for _, calls in found)
        runs.append([step["loss"] for step in found[0][0]])
    print("quickstart-sinks:", *(f"{loss:.6f}" for loss in runs[1]))
    assert runs[1] == pytest.approx(runs[0], rel=10**-LOSS_DIGITS)
    assert runs[1][-1] < runs[1][0]


@pytest.mark.slow
def test_capped_scores_equal_one_rank(alone):
    capped = alone("--cp-softcap 0.05")
    assert capped[0]["loss"] != pytest.approx(alone()[0]["loss"], rel=1e-3)
    assert_equal_runs(losses(2, context("ulysses", 2), "--cp-softcap 0.05"), capped)
