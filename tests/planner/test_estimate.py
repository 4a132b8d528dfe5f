"""The estimator: Megatron's own counts, laws of what a step takes, and published runs."""

import json
from dataclasses import replace
from fractions import Fraction

import pytest
from typer.testing import CliRunner

from megatron_cp.cli import app
from megatron_cp.context.trace.record import record
from megatron_cp.grid import Grid
from megatron_cp.hardware.cluster import Gemm
from megatron_cp.hardware.cluster_file import load_cluster, shipped_clusters
from megatron_cp.pipeline.build import build
from megatron_cp.pipeline.costs import uniform
from megatron_cp.pipeline.offload import Offload
from megatron_cp.pipeline.simulate import simulate
from megatron_cp.pipeline.slices import AttentionShares, shares
from megatron_cp.planner.estimate import estimate
from megatron_cp.planner.fit import fit, left_out
from megatron_cp.planner.memory import keys_for_slices, slice_lengths
from megatron_cp.planner.model import Transformer, model_of
from megatron_cp.planner.of_recipe import parallel_of
from megatron_cp.planner.parallel import Parallel, warnings
from megatron_cp.planner.published import published, summary
from megatron_cp.planner.work import PassTimes, RankConfig, ends, layer
from megatron_cp.recipe import recipe

H100 = load_cluster("dgx-h100-ib")
LLAMA = model_of(recipe.load("models/llama3.1-8b", {}))


def of(parallel: Parallel, model: Transformer = LLAMA, seq: int = 8192):
    return estimate(model, parallel, H100, seq)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama2-7b", 6.74),
        ("llama2-70b", 68.98),
        ("llama3.1-8b", 8.03),
        ("llama3.1-405b", 405.85),
        ("llama3.2-1b", 1.24),
    ],
)
def test_parameters_are_the_published_ones(name, billions):
    assert model_of(recipe.load(f"models/{name}", {})).parameters / 1e9 == pytest.approx(billions, abs=0.005)


def test_operations_are_the_published_ones():
    # 744 TFLOP/s beside 14,451 tokens/s, and when all pairs were counted 711 beside 12,273 (Megatron Bridge, NeMo)
    assert LLAMA.flops(8192, 1) / 8192 == pytest.approx(744e12 / 14451, rel=2e-3)
    assert LLAMA.flops(8192, 1, Fraction(1)) / 8192 == pytest.approx(711e12 / 12273, rel=2e-3)


def test_published_runs_are_met():
    errors = [run.error for run in published(record)]
    sizes = summary(errors)
    assert sizes.median <= 0.05
    assert sizes.worst <= 0.15
    assert min(errors) < -0.05 < 0.05 < max(errors)


# milliseconds of a stage and microbatch, a mean over stages, and of a hop, as the authors have profiled them
PROFILED = {"GPT 1.5B": (18.5, 18.1, 9.33, 0.601), "GPT 6.2B": (29.8, 29.5, 19.6, 0.527)}


@pytest.mark.parametrize("name", PROFILED)
def test_passes_are_as_long_as_the_zero_bubble_paper_profiled(name):
    run = next(run.estimate for run in published(None) if run.name.startswith(name))
    rank = RankConfig(model=run.model, parallel=run.parallel, cluster=run.cluster, seq=run.seq)
    layers, (first, last) = layer(rank), ends(rank)
    whole = PassTimes().plus(layers, run.model.layers).plus(first).plus(last)
    forward, backward, weight = (1e3 * part.total / run.parallel.pp for part in whole)
    f, b, w, hop = PROFILED[name]
    assert forward + backward == pytest.approx(f + b, rel=0.06)
    assert weight == pytest.approx(w, rel=0.05)
    size = run.parallel.micro_batch * run.seq * run.model.hidden * 2
    assert 1e3 * run.cluster.inside.hop_seconds(size) == pytest.approx(hop, rel=0.05)


LONG = replace(LLAMA, vocab=1024)
SLICED = Parallel(tp=8, sp=True, cp=2, pp=4, global_batch=4, schedule="1f1b", slices=8)


def test_slices_keep_what_the_simulated_schedule_keeps():
    seq = 2**18
    whole, sliced = (of(replace(SLICED, slices=k), LONG, seq) for k in (1, 8))
    rank = RankConfig(model=LONG, parallel=SLICED, cluster=H100, seq=seq)
    schedule = build("1f1b", 4, 4, slices=8)
    peaks = simulate(
        schedule, uniform(schedule.placement, (1, 1, 1, 0), slices=shares(slice_lengths(rank), AttentionShares()))
    ).peak
    # whole sequences of rank r: 4 - r
    for at, peak in enumerate(peaks):
        assert sliced.memory[at].activations == pytest.approx(peak * whole.memory[at].activations / (4 - at))
    assert sliced.worst_memory.activations < 0.5 * whole.worst_memory.activations
    assert sliced.parts.pipeline < 0.5 * whole.parts.pipeline
    # their shares add up to the work of a whole sequence
    assert sum(sliced.parts[:5]) == pytest.approx(sum(whole.parts[:5]))


def test_keys_of_slices_stay_where_activations_move():
    stays, moves = (of(replace(SLICED, moves=to), LONG, 2**18) for to in (None, Offload(4)))
    rank = RankConfig(model=LONG, parallel=SLICED, cluster=H100, seq=2**18)
    keys = LONG.layers / 4 * keys_for_slices(rank, 2)
    assert keys < moves.memory[0].activations < stays.memory[0].activations


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"schedule": None}, "8 slices of a sequence need a pipeline and --pp-schedule"),
        ({"schedule": "zb-v", "vp": 2}, "zb-v has no order for 8 slices"),
        ({"backend": "fpdt"}, "attention in chunks over time"),
    ],
)
def test_slices_are_refused_where_training_refuses_them(changes, reason):
    with pytest.raises(ValueError, match=reason):
        of(replace(SLICED, **changes), LONG, 2**18)


TWO_PIPES = Parallel(tp=8, sp=True, pp=4, dp=2, global_batch=16, schedule="dualpipe")


@pytest.mark.parametrize("distributed", [True, False])
def test_two_copies_take_the_memory_of_both_stages(distributed):
    two, one = (
        of(replace(TWO_PIPES, distributed_optimizer=distributed, schedule=name)) for name in ("dualpipe", "1f1b")
    )
    for at, (here, peer) in enumerate(zip(one.memory, reversed(one.memory), strict=True)):
        for kind in ("weights", "gradients", "optimizer"):
            assert getattr(two.memory[at], kind) == pytest.approx(getattr(here, kind) + getattr(peer, kind))
        # p + 1 microbatches, where the last rank of 1F1B keeps one; inputs of norms only until I
        assert 4 < two.memory[at].activations / one.memory[-1].activations <= 5 + 1e-9
        assert two.memory[at].logits == max(here.logits, peer.logits)


def test_both_copies_of_a_tied_embedding_take_memory():
    tied = replace(LLAMA, tied=True)
    for found, expected in zip(of(TWO_PIPES, tied).memory, of(TWO_PIPES).memory, strict=True):
        assert found.weights == expected.weights


@pytest.mark.parametrize("distributed", [True, False])
def test_the_gradients_of_two_copies_are_added_up_after_the_step(distributed):
    parallel = replace(TWO_PIPES, distributed_optimizer=distributed, dp=1, global_batch=8)
    two, link = of(parallel), H100.between
    size = two.memory[0].gradients
    assert two.parts.data == pytest.approx(link.hop_seconds(size) + 3 * size / H100.touch_bytes_per_s)
    assert two.traffic.between.data == pytest.approx(two.memory[1].gradients)


def test_two_copies_add_up_shards_where_the_optimizer_has_shards():
    two, one = (of(replace(TWO_PIPES, schedule=name)).traffic for name in ("dualpipe", "1f1b"))
    # of a parameter 2 bytes are gathered and 4 scattered, half of them by each rank; of two copies' a shard's 4 too
    assert two.inside.data + two.between.data == pytest.approx((one.inside.data + one.between.data) * (6 + 4) / 3)


@pytest.mark.parametrize("name", ["chimera", "chimera-zb", "dualpipe"])
def test_steps_of_many_microbatches_in_two_pipes_are_as_long_as_played(name, monkeypatch):
    parallel = replace(TWO_PIPES, schedule=name, global_batch=2 * 26)
    found = of(parallel)
    monkeypatch.setattr("megatron_cp.planner.pipelining.LONG", 100)
    assert found.parts.total == pytest.approx(of(parallel).parts.total)


def test_two_copies_do_as_much_work_as_one():
    two, one = (of(replace(TWO_PIPES, schedule=name)) for name in ("dualpipe", "zb-h1"))
    assert two.parts.attention == pytest.approx(one.parts.attention)
    # the slowest rank has half of the output layer's microbatches
    assert two.parts.products < one.parts.products


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"moves": Offload(2)}, "dualpipe holds two copies of the model, without activations that move"),
        ({"fsdp": True}, "dualpipe holds two copies of the model, without fully sharded data parallelism; take zb-v"),
        ({"global_batch": 18}, "half of the microbatches go down the ranks and half go up, got m = 9"),
    ],
)
def test_two_copies_are_refused_what_training_refuses_them(changes, reason):
    with pytest.raises(ValueError, match=reason):
        of(replace(TWO_PIPES, **changes))


def test_more_slices_than_a_sequence_has_are_refused():
    for slices in (8, 10**12):
        with pytest.raises(ValueError, match="take at most 4 slices"):
            of(replace(SLICED, slices=slices), LONG, 64)


def test_a_pipeline_that_waits_for_its_messages_is_slower_by_them():
    beside, waits = (
        of(Parallel(tp=8, sp=True, pp=4, vp=4, global_batch=64, overlap_p2p=on)).seconds for on in (True, False)
    )
    hop = H100.between.hop_seconds(8192 / 8 * LLAMA.hidden * 2)
    # forward and backward of each chunk
    assert waits - beside == pytest.approx(2 * 4 * 64 * hop, rel=0.2)


@pytest.mark.slow
def test_the_shipped_rates_are_those_of_the_fit():
    found = fit(record)
    assert all(abs(change) < 0.01 for change in found.changes([True] * len(found.runs)))
    without = left_out(found, record)
    for errors, worst in ((without.errors["without it"], 0.16), ([run.error for run in without.blind], 0.15)):
        sizes = summary(errors)
        assert sizes.median <= 0.05
        assert sizes.worst <= worst


def test_parts_add_up_to_the_step_and_none_is_negative():
    found = of(Parallel(tp=2, pp=4, vp=2, dp=2, sp=True, global_batch=32))
    assert found.seconds == pytest.approx(sum(found.parts))
    assert all(part >= -1e-9 for part in found.parts)
    assert found.mfu < 1


def test_sequences_of_a_microbatch_share_kernel_calls_and_messages():
    slow = replace(H100, call_s=0.5, inside=replace(H100.inside, latency_s=1.0))

    def wait(micro_batch: int) -> float:
        parallel = Parallel(cp=2, backend="all-gather", micro_batch=micro_batch, global_batch=micro_batch)
        seconds = [estimate(LLAMA, parallel, cluster, 8192, record).seconds for cluster in (slow, H100)]
        return seconds[0] - seconds[1]

    assert wait(4) == pytest.approx(wait(1), rel=1e-3)


def test_the_kernels_alone_are_a_lower_bound_of_every_backend():
    for backend in ("zigzag", "all-gather", "ulysses", "bidirectional"):
        parallel = Parallel(cp=4, backend=backend, global_batch=2)
        assert of(parallel, seq=16384).seconds < estimate(LLAMA, parallel, H100, 16384, record).seconds


def test_adam_in_bf16_is_sixteen_bytes_and_two_for_float32_gradients():
    whole, spread = (of(Parallel(dp=8, global_batch=8, distributed_optimizer=on)).worst_memory for on in (False, True))
    assert (whole.weights + whole.gradients + whole.optimizer) / LLAMA.parameters == 18
    assert spread.optimizer * 8 == whole.optimizer


def test_activations_of_a_layer_are_those_of_the_paper():
    # 34 bytes per token and hidden element without dropout's two, and with flash attention (arXiv:2205.05198, 4.1)
    gpt = Transformer(
        name="gpt", layers=1, hidden=1024, ffn=4096, heads=8, kv_heads=8, head_dim=128, vocab=1024, gated=False
    )
    kept = of(Parallel(), gpt, seq=2048).worst_memory.activations
    assert kept == pytest.approx(2048 * (32 * 1024 + 4 * 8))


def test_full_recomputation_trades_memory_for_a_forward_pass():
    plain, again = (of(Parallel(recompute=choice)) for choice in ("none", "full"))
    assert again.worst_memory.activations < plain.worst_memory.activations / 10
    assert 1.25 < again.seconds / plain.seconds < 1.35


def test_activations_on_the_host_take_memory_off_the_fullest_rank_and_are_free_for_long_sequences():
    plain = Parallel(tp=8, cp=2, pp=4, sp=True, global_batch=8, schedule="1f1b")
    for seq, free in ((8192, False), (131072, True)):
        kept = of(plain, seq=seq)
        moved = of(replace(plain, moves=Offload(2)), seq=seq)
        assert moved.memory[0].activations == pytest.approx(kept.memory[0].activations / 2)
        assert moved.seconds >= kept.seconds
        assert (moved.seconds <= kept.seconds * 1.001) == free
    lent = of(replace(plain, schedule="bpipe"), seq=131072)
    assert lent.memory[0].activations == pytest.approx(kept.memory[0].activations * 3 / 4)
    assert lent.memory[3].activations > kept.memory[3].activations


def test_more_microbatches_shrink_the_share_of_the_pipeline():
    shares = [
        of(Parallel(pp=4, global_batch=m)).parts.pipeline / of(Parallel(pp=4, global_batch=m)).seconds for m in (8, 64)
    ]
    assert shares[0] > 3 * shares[1]


def test_a_long_pipeline_is_continued_as_it_is_played():
    sizes = {m: of(Parallel(pp=4, vp=2, global_batch=m)).seconds for m in (12, 24, 48)}
    assert sizes[48] - sizes[24] == pytest.approx(2 * (sizes[24] - sizes[12]), rel=0.02)


def test_products_are_interpolated_between_sizes_and_flat_beyond():
    gemm = Gemm(4.0, (128, 512), (1.0, 3.0))
    assert [gemm.rate(size) for size in (64, 128, 256, 512, 9999)] == pytest.approx([1.0, 1.0, 2.0, 3.0, 3.0])


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"tp": 64}, "tensor parallel 64 must divide the 32 attention heads"),
        ({"pp": 3}, "32 layers do not divide into 3 x 1 stages"),
        ({"vp": 2}, "virtual stages .2. need a pipeline"),
        ({"cp": 3}, "context parallel 3 needs a sequence divisible by 6, got 8192"),
        ({"precision": "float32"}, "cluster 'dgx-h100-ib' has no rates of float32"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(parallel, message):
    with pytest.raises(ValueError, match=message):
        of(Parallel(**parallel))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"global_batch": 3, "dp": 2}, "global batch 3 must be a multiple"),
        ({"recompute": "some"}, "recompute must be one of"),
    ],
)
def test_a_batch_or_a_choice_that_is_none_is_refused(field, message):
    with pytest.raises(ValueError, match=message):
        Parallel(**field)


@pytest.mark.parametrize("name", [name for name in recipe.shipped("recipes") if name.startswith("recipes/tiny")])
def test_a_recipe_says_how_it_is_spread(name):
    run = recipe.load(name, {})
    parallel = parallel_of(run, model_of(run).layers)
    assert parallel.world == 2
    assert getattr(parallel, name[-3:-1]) == 2


def test_versions_of_weights_are_counted():
    flushed = of(Parallel(pp=4, global_batch=8, schedule="1f1b"))
    late = {name: of(replace(flushed.parallel, schedule=name)) for name in ("2bw", "pipedream-vertical")}
    for each in late.values():
        for mine, other in zip(each.memory, flushed.memory, strict=True):
            # bf16: the weights once more
            assert mine.weights == 2 * other.weights
            assert mine[1:] == other[1:]
    one_by_one = of(Parallel(pp=4, global_batch=1, schedule="pipedream")).memory
    single = of(Parallel(pp=4, global_batch=1, schedule="1f1b")).memory
    assert [mine.weights / other.weights for mine, other in zip(one_by_one, single, strict=True)] == [4, 3, 2, 1]
    # a step waits for all ranks' updates, and no longer for its own first microbatch
    assert late["2bw"].seconds < flushed.seconds


def test_free_running_ranks_do_not_wait_for_the_last_one_to_drain():
    waiting = Parallel(pp=4, global_batch=8, schedule="2bw")
    free = replace(waiting, free_running=True)
    model = replace(LLAMA, tied=False)
    saved = [of(replace(waiting, global_batch=m)).seconds - of(replace(free, global_batch=m)).seconds for m in (8, 96)]
    # p - 1 backwards of the slowest stage, however many microbatches a step has
    assert saved[0] == pytest.approx(saved[1], rel=0.05)
    assert 0.1 < saved[0] / of(waiting, model).seconds < 0.3
    assert of(free, model).memory == of(waiting, model).memory
    synchronous = of(Parallel(pp=4, vp=4, global_batch=8, schedule="izb"), model).seconds
    assert 0.9 < of(free, model).seconds / synchronous < 1
    with pytest.raises(ValueError, match="needs steps without a flush, got --pp-schedule 1f1b"):
        of(replace(free, schedule="1f1b"))
    with pytest.raises(ValueError, match="got none; add one, or leave --pp-free-running out"):
        of(replace(free, pp=1))
    with pytest.raises(ValueError, match="pass --untie-embeddings-and-output-weights"):
        of(free, replace(LLAMA, tied=True))


@pytest.mark.parametrize("name", [name for name in shipped_clusters() if name.startswith(("dgx", "a800"))])
def test_every_shipped_gpu_can_be_estimated(name):
    found = estimate(LLAMA, Parallel(tp=8, global_batch=2), load_cluster(name), 8192)
    assert 0.2 < found.mfu < 0.6
    assert found.fits


def test_an_extended_cluster_differs_only_where_it_says():
    whole, node = load_cluster("dgx-h100-ib"), load_cluster("dgx-h100")
    assert node.between is None
    assert replace(node, name=whole.name, between=whole.between) == whole


def test_heads_that_are_exchanged_between_nodes_are_warned_about():
    nodes = load_cluster("a100-ib")
    grid = Parallel(tp=8, cp=8, backend="usp", grid=Grid(2, 4))
    (said,) = warnings(grid, nodes)
    assert "inner axis of usp exchanges heads between nodes: it spans 16 ranks" in said
    assert "a node has 8; lower --tensor-model-parallel-size" in said
    (said,) = warnings(replace(grid, tp=2, grid=Grid(8, 1)), nodes)
    assert "take --hierarchical-context-parallel-sizes 4 2 with --cp-placement head-first" in said
    assert warnings(replace(grid, tp=2, grid=Grid(4, 2)), nodes) == []
    assert len(warnings(replace(grid, tp=2, grid=Grid(4, 2), placement="context-first"), nodes)) == 1
    assert warnings(replace(grid, backend="zigzag", grid=None), nodes) == []


def test_two_recipes_stand_beside_each_other():
    words = "estimate llama3.1-8b-8k-a100x8 --against llama3.1-8b-8k-h100x8".split()
    told = CliRunner().invoke(app, words, catch_exceptions=False).stdout
    assert "this: llama3.1-8b-8k-a100x8 on 8 ranks" in told
    assert "against: llama3.1-8b-8k-h100x8 on 8 ranks" in told
    row = next(line for line in told.splitlines() if line.strip("│ ").startswith("s per step"))
    here, there = (
        json.loads(CliRunner().invoke(app, ["estimate", name, "--json"]).stdout)["step_seconds"] for name in words[1::2]
    )
    assert f"{here / there - 1:+.1%}" in row
