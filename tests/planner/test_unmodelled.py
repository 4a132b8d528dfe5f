"""The estimate names the flags that it does not model, and takes what training takes."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_cp.cli import app
from megatron_cp.cli.estimate import estimate_recipe
from megatron_cp.context.trace.record import record
from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.planner.estimate import Estimate, estimate
from megatron_cp.planner.model import Latent, Transformer, model_of
from megatron_cp.planner.parallel import Parallel
from megatron_cp.planner.unmodelled import unmodelled
from megatron_cp.recipe import recipe
from megatron_cp.recipe.file import Unset

RECIPE = "llama3.1-8b-8k-h100x8"
PP2 = "--pipeline-model-parallel-size 2"
H100 = load_cluster("dgx-h100-ib")


def loaded(flags: str) -> recipe.Recipe:
    return recipe.load(RECIPE, Unset({}), flags.split())


@cache
def estimated(flags: str = "") -> Estimate:
    return estimate_recipe(loaded(flags))


# flags of other people's scripts, each of which an estimator may be tempted to pass over
SEEN = [
    "--recompute-activations",
    "--recompute-granularity full --recompute-method block --recompute-num-layers 1",
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 4",
    "--recompute-granularity selective --recompute-modules layernorm mlp",
    "--recompute-granularity selective --recompute-modules gdn_norm_out",
    f"{PP2} --pipeline-model-parallel-layout Et*10|t*22L",
    f"{PP2} --pipeline-model-parallel-layout Et*16m|t*16L --mtp-num-layers 1",
    f"{PP2} --decoder-first-pipeline-num-layers 10",
    f"{PP2} --decoder-last-pipeline-num-layers 10",
    "--use-torch-fsdp2",
    "--use-megatron-fsdp",
    "--use-megatron-fsdp --data-parallel-sharding-strategy optim",
    "--optimizer-cpu-offload",
    "--cpu-offloading-num-layers 4",
    "--fine-grained-activation-offloading",
    "--use-precision-aware-optimizer",
    "--use-precision-aware-optimizer --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16",
    "--window-size 128,0",
    "--window-size (127,0) --window-attn-skip-freq 4",
    "--mtp-num-layers 1",
    "--multi-latent-attention --kv-lora-rank 512",
    "--fp8-format hybrid",
    "--fp8-format hybrid --fp8-recipe blockwise",
    "--fp4-format e2m1",
    "--num-experts 8",
    "--num-experts 8 --moe-layer-freq [0]*8+[1]*24",
    "--num-experts 8 --moe-expert-capacity-factor 1.0",
    "--num-experts 8 --moe-router gshard",
    "--num-experts 8 --moe-layer-experts 17:16",
    "--num-experts 8 --tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1",
    "--attention-backend unfused",
    "--experimental-attention-variant dsa",
    "--cuda-graph-impl local",
    "--num-distributed-optimizer-instances 2",
    "--zero-quantized-gradients int4",
    "--zero-quantized-weights",
    f"{PP2} --pp-memory-limit 20",
    f"{PP2} --pp-schedule 1f1b --pp-vocab-parallel 1",
    f"{PP2} --pp-schedule 2bw --pp-free-running",
    "--delay-wgrad-compute",
    "--hybrid-layer-pattern M*",
    "--optimizer muon",
    "--no-such-flag-yet 3",
]


@pytest.mark.parametrize("flags", SEEN)
def test_a_flag_is_modelled_or_named(flags: str) -> None:
    # where a flag needs others, the same without it
    base = flags.rpartition("--")[0] if flags.startswith((PP2, "--num-experts 8 ", "--fp8-format hybrid ")) else ""
    base = base if "--pipeline-model-parallel-layout" not in base else PP2
    here, there = (figures(estimated(text)) for text in (flags, base))
    assert here != there or unmodelled(loaded(flags)) != unmodelled(loaded(base))


def figures(found: Estimate) -> tuple[object, ...]:
    return found.parts, found.memory


@pytest.mark.parametrize(
    "flags",
    ["--optimizer-cpu-offload", "--torch-fsdp2-no-reshard-after-forward", "--fp4-format e2m1", "--no-such-flag-yet 3"],
)
def test_a_flag_that_is_not_modelled_is_printed(flags: str) -> None:
    command = ["estimate", RECIPE, *flags.split()]
    assert f"not in the estimate: {flags}\n" in CliRunner().invoke(app, command).stdout
    assert json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)["not_in_the_estimate"] == [flags]


def test_what_the_other_recipe_leaves_out_is_printed(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(f"extends: [recipes/{RECIPE}]\nMODEL_ARGS:\n  --optimizer-cpu-offload: true\n")
    command = ["estimate", RECIPE, "--against", str(own)]
    told = CliRunner().invoke(app, command, catch_exceptions=False).stdout
    assert f"not in the estimate of {own}: --optimizer-cpu-offload\n" in told
    found = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert (found["not_in_the_estimate"], found["against"]["not_in_the_estimate"]) == ([], ["--optimizer-cpu-offload"])


@pytest.mark.parametrize("name", recipe.shipped("recipes"))
def test_a_shipped_recipe_leaves_nothing_out(name: str) -> None:
    assert unmodelled(recipe.load(name, Unset({}))) == []


@pytest.mark.parametrize(
    ("one", "same"),
    [
        ("--recompute-activations", "--recompute-granularity selective"),
        (f"{PP2} --pp-schedule zb-v", f"{PP2} --pp-schedule zb-v --num-virtual-stages-per-pipeline-rank 2"),
        (f"{PP2} --pp-schedule auto --pp-profile-steps 3", f"{PP2} --pp-schedule auto"),
        (f"{PP2} --decoder-first-pipeline-num-layers 10", f"{PP2} --pipeline-model-parallel-layout Et*10|t*22L"),
        (
            "--recompute-granularity full --recompute-method block --recompute-num-layers 32",
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        ),
        ("--context-parallel-size 2 --cp-comm-type auto", "--context-parallel-size 2 --cp-comm-type zigzag"),
    ],
)
def test_two_ways_to_say_a_run_are_one_estimate(one: str, same: str) -> None:
    assert figures(estimated(one)) == figures(estimated(same))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--tensor-model-parallel-size 2 --sequence-parallel --seq-length 8191", "divisible by TP x CP = 2, got 8191"),
        ("--window-size 128", "--window-size takes two ints"),
        (f"{PP2} --pipeline-model-parallel-layout Et*10|t*21L", "has 2 stages and 31 layers for 2 ranks and 32"),
        (f"{PP2} --pipeline-model-parallel-layout Ex|L", "is made of E t m L"),
        ("--pipeline-model-parallel-size 4 --decoder-first-pipeline-num-layers 9", "leave 23 layers for 3 ranks"),
        ("--num-experts 8 --moe-layer-freq [0]*8+[1]*23", "--moe-layer-freq takes a number, or lists"),
        ("--use-precision-aware-optimizer --exp-avg-dtype int8", "--exp-avg-dtype is one of fp32"),
        ("--num-experts 8 --expert-model-parallel-size 8 --expert-tensor-parallel-size 3", "expert parallel 8 x 3"),
    ],
)
def test_a_value_that_is_none_is_refused(flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimated(flags)


def test_block_recomputation_is_between_none_and_all() -> None:
    none, some, every = (
        estimated(f"--recompute-granularity full --recompute-method block --recompute-num-layers {n}" if n else "")
        for n in (0, 8, 32)
    )
    share = (some.seconds - none.seconds) / (every.seconds - none.seconds)
    assert share == pytest.approx(0.25, rel=1e-6)
    kept = [one.worst_memory.activations for one in (none, some, every)]
    assert (kept[0] - kept[1]) / (kept[0] - kept[2]) == pytest.approx(0.25, rel=1e-6)


def test_uniform_recomputation_keeps_the_input_of_each_group() -> None:
    one, four = (
        estimated(f"--recompute-granularity full --recompute-method uniform --recompute-num-layers {n}").worst_memory
        for n in (1, 4)
    )
    assert one.activations == 4 * four.activations
    assert one.buffers < four.buffers


def test_a_window_costs_the_pairs_that_it_leaves() -> None:
    model, parallel = model_of(loaded("")), Parallel(global_batch=1)
    plain = estimate(model, parallel, H100, 8192)
    half = estimate(replace(model, window=(8191, 0), windowed=32), parallel, H100, 8192)
    assert half.parts == plain.parts
    short = estimate(replace(model, window=(127, 0), windowed=32), replace(parallel), H100, 8192)
    pairs = 128 * 8192 - 128 * 127 / 2
    assert short.parts.attention / plain.parts.attention == pytest.approx(pairs / (8192 * 8193 / 2), rel=0.25)
    mixed = estimate(replace(model, window=(127, 0), windowed=16), parallel, H100, 8192)
    assert mixed.parts.attention == pytest.approx((short.parts.attention + plain.parts.attention) / 2)


# DeepSeek-V3 without its layers of multi-token prediction: 671 billion parameters (arXiv:2412.19437, 4.2)
DEEPSEEK = Transformer(
    name="DeepSeek-V3",
    layers=61,
    hidden=7168,
    ffn=18432,
    heads=128,
    kv_heads=128,
    head_dim=160,
    vocab=129280,
    experts=256,
    top_k=8,
    expert_ffn=2048,
    shared_expert_ffn=2048,
    moe_pattern=(0,) * 3 + (1,) * 58,
    latent=Latent(1536, 512, 128, 64, 128),
)


def test_latent_attention_has_the_published_number_of_parameters() -> None:
    assert DEEPSEEK.parameters / 1e9 == pytest.approx(671, abs=0.5)
    # 14 billion more for one layer of multi-token prediction, of which the embeddings are shared
    assert (replace(DEEPSEEK, mtp=1).parameters - DEEPSEEK.parameters) / 1e9 == pytest.approx(11.5, abs=0.6)


def test_latents_that_travel_are_fewer_bytes_and_less_memory() -> None:
    model = replace(DEEPSEEK, layers=2, experts=0, moe_pattern=())
    sizes = Parallel(cp=4, micro_batch=1, global_batch=1)
    expanded, latent = (estimate(model, replace(sizes, latent=sends), H100, 32768, record) for sends in (False, True))
    of_expanded, of_latent = (sum(level.context for level in each.traffic) for each in (expanded, latent))
    # r + p in both passes and its gradient for K and V of 128 heads, twice, and their gradients in float32
    assert of_latent / of_expanded == pytest.approx((512 + 64) * 3 / (128 * 160 * (2 + 2 + 4)), rel=1e-6)
    saved = expanded.worst_memory.activations - latent.worst_memory.activations
    assert saved == 2 * 32768 / 4 * 2 * (2 * 128 * 160 - 576)
    # expanding the tokens of four ranks in each takes longer than its own
    assert latent.parts.products + latent.parts.attention > expanded.parts.attention
    with pytest.raises(ValueError, match="latents of multi-latent attention, which this model lacks"):
        estimate(replace(model, latent=None), replace(sizes, latent=True), H100, 32768)


def test_optimizer_state_is_what_its_dtypes_take() -> None:
    plain = estimated().worst_memory.optimizer
    # float32 master weights beside bf16 weights need 2 bytes
    assert estimated("--use-precision-aware-optimizer").worst_memory.optimizer == plain * 10 / 12
    small = "--use-precision-aware-optimizer --exp-avg-dtype fp8 --exp-avg-sq-dtype bf16"
    assert estimated(small).worst_memory.optimizer == plain * 5 / 12


FSDP = "--use-megatron-fsdp --megatron-fsdp-main-grads-dtype fp32 --data-parallel-sharding-strategy"
# what each rank keeps of weights, gradients and optimizer states where all are sharded over the four ranks
SHARES = {
    "--use-distributed-optimizer=false": (4, 4, 4),
    "--use-distributed-optimizer": (4, 4, 1),
    "--use-distributed-optimizer --num-distributed-optimizer-instances 2": (4, 4, 2),
    f"{FSDP} no_shard": (4, 4, 4),
    f"{FSDP} optim": (4, 4, 1),
    f"{FSDP} optim_grads": (4, 1, 1),
    f"{FSDP} optim_grads_params": (1, 1, 1),
    f"{FSDP} optim_grads_params --num-distributed-optimizer-instances 2": (2, 2, 2),
}


@pytest.mark.parametrize("flags", SHARES)
def test_a_rank_keeps_its_share_of_what_is_sharded(flags: str) -> None:
    whole, found = (estimated(text).worst_memory for text in (f"{FSDP} optim_grads_params", flags))
    for name, share in zip(("weights", "gradients", "optimizer"), SHARES[flags], strict=True):
        assert getattr(found, name) == pytest.approx(share * getattr(whole, name))


def test_gradients_of_sharded_data_parallelism_are_in_the_models_dtype_by_default() -> None:
    whole, fsdp, torchs = (
        estimated(text).worst_memory.gradients for text in (f"{FSDP} optim", "--use-megatron-fsdp", "--use-torch-fsdp2")
    )
    assert fsdp == torchs == whole / 2 / 4


@pytest.mark.parametrize(
    ("flags", "times"),
    [
        ("--use-distributed-optimizer", 6),
        ("--use-distributed-optimizer=false", 8),
        # 32 microbatches of a rank
        (f"{FSDP} optim", 6),
        (f"{FSDP} optim_grads", 2 + 32 * 4),
        (f"{FSDP} optim_grads_params", 2 * 32 * 2 + 32 * 4),
    ],
)
def test_what_is_sharded_is_sent_in_every_microbatch(flags: str, times: int) -> None:
    parameters = estimated("--use-distributed-optimizer").worst_memory.weights / 2
    run = estimated(flags)
    assert run.parallel.micros == 32
    assert run.traffic.inside.data + run.traffic.between.data == pytest.approx(times * parameters * 3 / 4)


def test_instances_that_do_not_divide_the_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--num-distributed-optimizer-instances 3 must divide .* = 4"):
        estimated("--num-distributed-optimizer-instances 3")


def test_experts_are_split_by_their_own_tensor_parallel_size() -> None:
    mixture = replace(DEEPSEEK, latent=None, layers=4, moe_pattern=(1,) * 4)
    sizes = {"tp": 4, "dp": 2, "sp": True, "global_batch": 2}
    whole, split = (
        estimate(mixture, Parallel(**sizes, ep=ep, etp=etp), H100, 4096).worst_memory.weights
        for ep, etp in ((8, 1), (2, 4))
    )
    # either way an eighth of the experts is on a rank
    assert whole == split
    assert estimate(mixture, Parallel(**sizes, ep=2), H100, 4096).worst_memory.weights == split


def test_kept_attention_costs_its_output_and_saves_its_forward() -> None:
    cp = "--context-parallel-size 4 --cp-comm-type zigzag --seq-length 131072"
    full = f"{cp} --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    none, kept, again = (estimated(flags) for flags in (cp, f"{full} --cp-keep-attention", full))
    # out in bfloat16 and a float32 for each row of 32 heads of 128
    output = 32 * 131072 / 4 * 32 * (2 * 128 + 4) / kept.parallel.tp
    assert kept.worst_memory.activations - again.worst_memory.activations == pytest.approx(output)
    assert none.seconds < kept.seconds < again.seconds
    assert kept.parts.attention == pytest.approx(none.parts.attention)
    of_none, of_kept, of_again = (sum(level.context for level in each.traffic) for each in (none, kept, again))
    assert of_kept == of_none
    # a forward sends K and V, a backward both again with their gradients in float32
    assert of_again == pytest.approx(of_none * (1 + 2 / 8), rel=0.05)


def test_kept_attention_of_a_selective_run_is_that_of_none() -> None:
    cp = "--context-parallel-size 4 --cp-comm-type zigzag"
    kept = estimated(f"{cp} --recompute-granularity selective --cp-keep-attention")
    assert figures(kept) == figures(estimated(cp))


def test_islands_average_weights_and_moments_once_in_their_steps() -> None:
    islands = "--use-distributed-optimizer --num-distributed-optimizer-instances 2"
    every_step, apart = estimated(islands), estimated(f"{islands} --local-sgd-steps 1:1,9:4")
    parameters = every_step.worst_memory.weights / 2
    difference = data_bytes(every_step) - data_bytes(apart)
    # gradients of four bytes in every step, or twelve in one of four; shards of half the parameters, two islands
    assert difference == pytest.approx((2 * 4 - 2 * 12 / 4) * parameters / 2 / 2)
    outer = estimated(f"{islands} --local-sgd-steps 4 --local-sgd-outer nesterov")
    assert outer.worst_memory.optimizer - apart.worst_memory.optimizer == pytest.approx(8 * parameters / 2)


def data_bytes(found: Estimate) -> float:
    return found.traffic.inside.data + found.traffic.between.data


def test_chunks_of_mlp_and_loss_cost_their_forward_and_save_memory() -> None:
    whole, chunked = estimated(""), estimated("--cp-loss-chunks 8 --mlp-chunks-for-training 8")
    assert chunked.worst_memory.logits == pytest.approx(whole.worst_memory.logits / 8)
    assert chunked.worst_memory.activations < whole.worst_memory.activations
    assert chunked.worst_memory.buffers < whole.worst_memory.buffers
    assert whole.parts.products < chunked.parts.products < whole.parts.products * 4 / 3
