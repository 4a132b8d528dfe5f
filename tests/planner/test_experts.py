"""What the estimate and a plan make of experts: dispatchers, two hops, pieces, capacities, loads, more experts."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megatron_cp.cli import app
from megatron_cp.context.trace.record import record
from megatron_cp.experts import AUTO, PLACEMENTS, TOKENS, TWO_HOP, WEIGHTS
from megatron_cp.experts.dispatch_cost import STOCK, Dispatch, DispatchSize, ExpertRanks, PassSeconds, dispatch_seconds
from megatron_cp.experts.routed import EVEN, Routing, loads_of
from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.planner.dispatch import dispatch_why, routed_share, weighed
from megatron_cp.planner.estimate import Estimate, estimate
from megatron_cp.planner.model import Transformer, model_of
from megatron_cp.planner.of_recipe import parallel_of
from megatron_cp.planner.parallel import Parallel
from megatron_cp.planner.placements import placement_why
from megatron_cp.planner.plan_recipe import as_recipe
from megatron_cp.planner.plan_request import FixedSizes, PlanRequest
from megatron_cp.planner.plans import Plans, label
from megatron_cp.planner.search import search
from megatron_cp.planner.unmodelled import unmodelled
from megatron_cp.recipe import recipe
from megatron_cp.recipe.file import Unset

H100 = load_cluster("dgx-h100-ib")
TWO = STOCK._replace(comm_type=TWO_HOP)
GATHERING = STOCK._replace(dispatcher="allgather")

# 16 experts on two nodes of 8 ranks; 2 microbatches of 1024 tokens with 2 rows of experts each, 4 layers
MIXTURE = Transformer(
    name="mixture",
    layers=4,
    hidden=1024,
    ffn=2048,
    heads=8,
    kv_heads=8,
    head_dim=128,
    vocab=1024,
    experts=16,
    top_k=2,
    expert_ffn=512,
)
SPREAD = Parallel(dp=16, ep=16, global_batch=32)
LAYERS = 2 * 4


def of(dispatch: Dispatch = STOCK, model: Transformer = MIXTURE) -> Estimate:
    return estimate(model, replace(SPREAD, dispatch=dispatch), H100, 1024)


def mixtral(flags: str = "") -> recipe.Recipe:
    return recipe.load("models/mixtral-8x7b", Unset({}), [*flags.split(), "--nproc-per-node", "8"])


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ("", STOCK),
        ("--moe-token-dispatcher-type allgather", GATHERING),
        ("--moe-comm-type 2dh --moe-ranks-per-node 4", TWO._replace(per_node=4)),
        ("--moe-comm-type fastermoe --moe-pieces 4", STOCK._replace(comm_type="fastermoe", pieces=4)),
        ("--moe-comm-type fastermoe", STOCK._replace(comm_type="fastermoe")),
        ("--moe-comm-type fastermoe --moe-group-ranks 2", STOCK._replace(comm_type="fastermoe", group=2)),
        ("--moe-token-dispatcher-type allgather --moe-pieces 2", STOCK._replace(pieces=2)),
        ("--moe-token-dispatcher-type flex", STOCK._replace(dispatcher="flex")),
        ("--expert-tensor-parallel-size 2 --moe-gather weights", STOCK._replace(gather=WEIGHTS)),
        # nobody shares an expert
        ("--moe-gather weights", STOCK),
        ("--expert-tensor-parallel-size 2 --moe-comm-type tutel", STOCK),
        (
            "--expert-tensor-parallel-size 2 --moe-comm-type tutel --transformer-impl local",
            STOCK._replace(gather=AUTO),
        ),
    ],
)
def test_flags_say_how_tokens_travel(flags: str, found: Dispatch) -> None:
    assert parallel_of(mixtral(flags), 32).dispatch == found


def test_megatrons_default_is_its_allgather_dispatcher_and_dense_models_have_none() -> None:
    left_out = parallel_of(mixtral("--moe-token-dispatcher-type=false"), 32)
    dense = parallel_of(recipe.load("models/llama3.1-8b", Unset({}), ["--nproc-per-node", "8"]), 32)
    assert (left_out.dispatch, dense.dispatch) == (GATHERING, STOCK)
    with pytest.raises(ValueError, match="unknown dispatcher 'alltoal'"):
        parallel_of(mixtral("--moe-token-dispatcher-type alltoal"), 32)
    with pytest.raises(ValueError, match="--moe-gather is one of tokens, weights, auto, got 'weigts'; did you mean"):
        parallel_of(mixtral("--moe-gather weigts"), 32)


@pytest.mark.parametrize("dispatch", [STOCK, GATHERING, TWO], ids=str)
def test_a_step_has_each_layers_way_of_tokens(dispatch: Dispatch) -> None:
    size = DispatchSize(tokens=1024, rows=2 * 1024, row_bytes=2 * 1024, experts=16)
    each = dispatch_seconds(dispatch, size, ExpertRanks(16), H100, PassSeconds(0.0, 0.0)).total
    # nothing else of this model is a collective within a microbatch
    assert of(dispatch).parts.collectives == pytest.approx(LAYERS * each)


def test_two_hops_send_as_much_between_nodes_and_more_inside() -> None:
    # 2048 rows of 2048 bytes there and back in both passes, a probability of 4 bytes there and its gradient back
    once = 2048 * (4 * 2048 + 2 * 4)
    one, two, gathered = (of(dispatch).traffic for dispatch in (STOCK, TWO, GATHERING))
    assert (one.inside.expert, one.between.expert) == pytest.approx((LAYERS * once * 7 / 16, LAYERS * once * 8 / 16))
    assert (two.inside.expert, two.between.expert) == pytest.approx((LAYERS * once * 7 / 8, LAYERS * once * 8 / 16))
    # all tokens go to 15 ranks, with 16 probabilities, their gradients and marks each; one hop in 8 leaves a node
    ring = 15 * 1024 * (4 * 2048 + 16 * (2 * 4 + 1))
    found = (gathered.inside.expert, gathered.between.expert)
    assert found == pytest.approx((LAYERS * ring * 7 / 8, LAYERS * ring / 8))


@pytest.mark.parametrize(
    ("changed", "times"),
    [
        ({"recompute": "full"}, 3 / 2),
        ({"recompute": "full", "recompute_method": "block", "recompute_layers": 2}, 5 / 4),
        ({"recompute": "selective", "recomputed": ("moe",)}, 3 / 2),
        ({"recompute": "selective"}, 1),
    ],
)
def test_a_recomputation_sends_tokens_once_more(changed: dict[str, Any], times: float) -> None:
    # a forward is half of both passes; in blocks two of four layers
    again = estimate(MIXTURE, replace(SPREAD, **changed), H100, 1024)
    assert sent(again) == pytest.approx(times * sent(of()))


@pytest.mark.parametrize(("seq", "width", "cheaper"), [(64, 1 << 14, TOKENS), (1 << 14, 512, WEIGHTS)])
def test_what_ranks_gather_that_share_each_expert_is_priced(seq: int, width: int, cheaper: str) -> None:
    model = replace(MIXTURE, expert_ffn=width)
    split = Parallel(tp=2, sp=True, dp=8, ep=8, etp=2, global_batch=32)
    tokens, weights, either = (
        estimate(model, replace(split, dispatch=STOCK._replace(gather=gather)), H100, seq)
        for gather in (TOKENS, WEIGHTS, AUTO)
    )
    assert either.seconds == min(tokens.seconds, weights.seconds)
    assert (weights.seconds < tokens.seconds) == (cheaper == WEIGHTS)
    # two experts of each layer in bfloat16
    more = weights.worst_memory.weights - tokens.worst_memory.weights
    assert more == pytest.approx(4 * 2 * 3 * 1024 * width * 2)
    # of Megatron's dispatchers, the one that gathers all tokens knows no weights
    said = "with --moe-gather weights, with --transformer-impl local" in dispatch_why(tokens.rank, [], [])
    assert said == (cheaper == WEIGHTS)


def test_ranks_that_share_experts_are_neighbours_but_for_those_that_share_each() -> None:
    # 8 ranks of expert parallelism lie on one node, and on two where two neighbours share each expert
    near, far = (
        estimate(MIXTURE, Parallel(tp=2, sp=True, dp=8, ep=8, etp=etp, global_batch=8), H100, 1024).traffic
        for etp in (1, 2)
    )
    assert near.between.expert == 0 < far.between.expert


def test_pieces_hide_messages_behind_experts_and_take_more_calls() -> None:
    model = model_of(mixtral())
    sizes = Parallel(dp=8, ep=8, global_batch=8)
    whole, pieces, alone = (
        estimate(model, replace(sizes, ep=ep, dispatch=STOCK._replace(pieces=number)), H100, 8192)
        for ep, number in ((8, 1), (8, 4), (1, 4))
    )
    # the first way there and the last one back remain, a quarter each, and four times as many latencies
    assert 0.25 * whole.parts.collectives < pieces.parts.collectives < 0.5 * whole.parts.collectives
    assert pieces.parts.products > whole.parts.products
    assert (pieces.memory, pieces.traffic) == (whole.memory, whole.traffic)
    # a rank that has all experts cuts nothing
    assert alone.parts == estimate(model, replace(sizes, ep=1), H100, 8192).parts


def test_less_work_hides_messages_where_weight_gradients_wait() -> None:
    model = replace(model_of(mixtral()), layers=4, expert_ffn=64)
    sizes = Parallel(dp=8, ep=8, pp=2, global_batch=64, dispatch=STOCK._replace(pieces=2))
    together, apart = (
        estimate(model, replace(sizes, schedule=name), H100, 8192).parts.collectives for name in ("1f1b", "zb-h1")
    )
    assert together < apart


def test_unequal_nodes_are_refused_with_two_hops_alone() -> None:
    model, sizes = replace(MIXTURE, experts=12), Parallel(dp=12, ep=12, global_batch=12)
    assert estimate(model, sizes, H100, 1024).seconds > 0
    with pytest.raises(ValueError, match="needs as many of the ranks that share a layer's experts on each node"):
        estimate(model, replace(sizes, dispatch=TWO), H100, 1024)


def test_gathered_tokens_are_in_memory_beside_the_rest() -> None:
    one, gathered = (of(dispatch).worst_memory for dispatch in (STOCK, GATHERING))
    # 16 ranks' tokens of 1024 features in bfloat16
    assert gathered.buffers - one.buffers == pytest.approx(16 * 1024 * 1024 * 2)
    assert gathered._replace(buffers=0) == one._replace(buffers=0)


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ("", EVEN),
        ("--moe-expert-capacity-factor 0.5", Routing(factor=0.5)),
        ("--moe-expert-capacity-factor 2 --moe-pad-expert-input-to-capacity", Routing(factor=2.0, padded=True)),
        ("--moe-pad-expert-input-to-capacity", EVEN),
        ("--moe-router switch --moe-expert-capacity-factor 1.25 --moe-group-tokens 512", Routing(1.25, 512)),
        ("--moe-expert-capacity-factor 1e0 --moe-group-tokens 512", Routing(factor=1.0)),
    ],
)
def test_flags_say_what_the_router_drops(flags: str, found: Routing) -> None:
    assert model_of(mixtral(flags)).routing == found


def test_a_capacity_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--moe-expert-capacity-factor takes a number such as 1.25, got 'much'"):
        model_of(mixtral("--moe-expert-capacity-factor much"))


def sent(found: Estimate) -> float:
    return found.traffic.inside.expert + found.traffic.between.expert


def test_dropped_tokens_are_neither_sent_nor_computed_and_padding_is() -> None:
    whole, half, padded = (
        of(model=replace(MIXTURE, routing=routing))
        for routing in (EVEN, Routing(factor=0.5), Routing(factor=2.0, padded=True))
    )
    # an expert takes 64 of the 128 that ask for it, or computes 256
    assert [sent(each) / sent(whole) for each in (half, padded)] == pytest.approx([0.5, 2.0], rel=1e-3)
    assert half.parts.products < whole.parts.products < padded.parts.products
    # three tensors of bfloat16 are as wide as the state and the expert of a row: gate, value and activation
    row = 2 * 3 * (512 + 1024)
    kept = [each.worst_memory.activations / (4 * 1024) for each in (half, whole, padded)]
    assert [kept[1] - kept[0], kept[2] - kept[1]] == pytest.approx([row, 2 * row], rel=1e-3)
    # operations are those of the model, as Megatron counts them
    assert half.flops_per_gpu() * half.seconds == pytest.approx(whole.flops_per_gpu() * whole.seconds)
    assert routed_share(half.rank).dropped == pytest.approx(0.5, rel=1e-3)
    assert routed_share(padded.rank).dropped == pytest.approx(-1.0)


def test_the_busiest_rank_is_waited_for() -> None:
    even, uneven = of(), of(model=replace(MIXTURE, routing=Routing(skew=1.2)))
    times = 16 * loads_of(16, 1.2)[0]
    assert routed_share(uneven.rank) == pytest.approx((0.0, times))
    assert uneven.parts.products > even.parts.products
    assert uneven.parts.collectives > even.parts.collectives
    assert uneven.worst_memory.activations > even.worst_memory.activations
    # a mean over ranks
    assert sent(uneven) == sent(even)


PYRAMID = replace(MIXTURE, layer_experts=(16, 16, 32, 32))


def test_layers_with_more_experts_are_counted_as_they_are() -> None:
    few, many, both = (
        of(model=replace(MIXTURE, experts=experts, layer_experts=layers))
        for experts, layers in ((16, ()), (32, ()), (16, PYRAMID.layer_experts))
    )
    # up, gate and down of 512 for each expert, and the routers' columns
    assert PYRAMID.expert_parameters == 2 * (16 + 32) * 3 * 1024 * 512
    assert PYRAMID.dense_parameters - MIXTURE.dense_parameters == 2 * (32 - 16) * 1024
    for part in ("products", "memory", "collectives"):
        mean = (getattr(few.parts, part) + getattr(many.parts, part)) / 2
        assert getattr(both.parts, part) == pytest.approx(mean)
    assert both.worst_memory.weights == pytest.approx((few.worst_memory.weights + many.worst_memory.weights) / 2)
    # of every other layer, the first and the third
    assert replace(PYRAMID, moe_every=2).mixtures == {16: 1, 32: 1}
    assert replace(PYRAMID, moe_pattern=(0, 0, 0, 1)).mixtures == {32: 1}


def test_flags_say_the_experts_of_each_layer() -> None:
    model = model_of(mixtral("--moe-layer-experts 17:16,32:32"))
    assert model.layer_experts == (8,) * 16 + (16,) * 15 + (32,)
    with pytest.raises(ValueError, match="needs multiples of --num-experts 8, got 12"):
        model_of(mixtral("--moe-layer-experts 17:12"))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--moe-comm-type two-hop --moe-ranks-per-node 8 --moe-pieces 2 --moe-layer-experts 17:16", ()),
        ("--moe-router switch --moe-expert-capacity-factor 1 --moe-group-tokens 512", ()),
        ("--moe-comm-type tutel", ("--moe-comm-type tutel",)),
        ("--moe-comm-type lina", ("--moe-comm-type lina",)),
        ("--moe-router gshard --moe-expert-capacity-factor 1", ("--moe-router gshard",)),
        ("--pipeline-model-parallel-size 2 --moe-layer-experts 17:16", ("--moe-layer-experts 17:16",)),
    ],
)
def test_what_is_not_known_of_experts_is_named(flags: str, named: tuple[str, ...]) -> None:
    assert set(unmodelled(mixtral(flags))) - set(unmodelled(mixtral())) == set(named)


REQUEST = PlanRequest(
    model=model_of(mixtral()),
    seq=8192,
    gpus=64,
    cluster=H100,
    global_batch=64,
    backends=("zigzag",),
    schedules=("1f1b",),
    fixed=FixedSizes(tp=2, cp=1, pp=1, ep=8, micro_batch=1),
)


NONE: dict[str, Any] = {"exchanges": (), "pieces": ()}
OURS: dict[str, Any] = {"exchanges": (TWO_HOP,), "pieces": (2, 4)}


@cache
def planned(ours: bool) -> Plans:
    return search(replace(REQUEST, **(OURS if ours else NONE)), record, 1)


@pytest.mark.parametrize("ours", [False, True])
def test_a_plan_takes_the_fastest_way_of_tokens_and_says_why(tmp_path: Path, ours: bool) -> None:
    best = planned(ours).best
    ways = weighed(best.rank, **(OURS if ours else NONE))
    assert best.parallel.dispatch == ways[0].dispatch
    # Megatron's two, and with ours two-hop, and both exchanges in 2 and in 4 pieces
    assert len(ways) == (7 if ours else 2)
    assert [way.seconds for way in ways] == sorted(way.seconds for way in ways)
    travelling, placed = planned(ours).experts_why
    first = f"tokens travel to experts by {ways[0].dispatch}: {ways[0].seconds * 1e3:.3g} ms for the experts of a layer"
    assert travelling.startswith(first)
    assert all(str(way) in travelling for way in ways[1:])
    assert placed == "placement of copies: none, since equal loads are assumed (--skew, --expert-loads)"
    if ways[0].dispatch != STOCK:
        assert f"EP=8 ({ways[0].dispatch})" in label(best.parallel)
    file = tmp_path / "planned.yaml"
    file.write_text(as_recipe(best, "models/mixtral-8x7b"))
    assert parallel_of(recipe.load(str(file), {"DATA_PATH": "corpus"}), 32) == best.parallel


def test_a_plan_with_our_ways_is_no_slower() -> None:
    assert planned(True).best.seconds <= planned(False).best.seconds
    # weights that wait, fp8 and padding leave no pieces
    rank = planned(True).best.rank
    for changed in (
        replace(rank, parallel=replace(rank.parallel, pp=2, dp=16, schedule="zb-h1")),
        replace(rank, parallel=replace(rank.parallel, precision="fp8")),
        replace(rank, model=replace(rank.model, routing=Routing(factor=1.0, padded=True))),
    ):
        assert {way.dispatch.pieces for way in weighed(changed, **OURS)} == {1}


def test_groups_of_ranks_are_weighed_where_training_has_them() -> None:
    rank = planned(True).best.rank
    by_groups = STOCK._replace(comm_type="fastermoe")
    for changed, found in (
        ({}, True),
        ({"pp": 2, "dp": 16, "schedule": "zb-h1"}, False),
        ({"precision": "fp8"}, False),
        ({"etp": 2}, False),
    ):
        other = replace(rank, parallel=replace(rank.parallel, **{"tp": 2, "etp": 1, **changed}))
        assert (by_groups in [way.dispatch for way in weighed(other, ("fastermoe",), ())]) == found


def test_copies_of_busy_experts_are_weighed_where_loads_are_uneven() -> None:
    best = planned(False).best
    uneven = replace(best, model=replace(best.model, routing=Routing(skew=1.2)))
    told = placement_why(uneven)
    assert told.startswith("placement of copies: ")
    assert all(f"{name} " in told for name in ("none", *PLACEMENTS.names))
    # each of 8 ranks has one expert
    assert f"(busiest rank {8 * loads_of(8, 1.2)[0]:.2f} times the mean)" in told
    bound = replace(best, model=replace(best.model, routing=Routing(factor=1.0, skew=1.2)))
    assert placement_why(bound) == "placement of copies: none, since a capacity drops what makes experts busy"
    alone = replace(uneven, parallel=replace(uneven.parallel, ep=1))
    assert placement_why(alone) == "placement of copies: none, since no rank lacks an expert"
    assert {way.dispatch for way in weighed(alone.rank, **OURS)} == {STOCK, GATHERING}


def test_estimate_prints_what_becomes_of_tokens() -> None:
    flags = "--num-experts 8 --expert-model-parallel-size 4 --moe-token-dispatcher-type alltoall --skew 1.2"
    command = ["estimate", "llama3.1-8b-8k-h100x8", *flags.split()]
    uneven = 4 * sum(loads_of(8, 1.2)[:2])
    told = CliRunner().invoke(app, command, catch_exceptions=False).stdout
    assert (
        "tokens travel to experts by alltoall; 0.0% of tokens' choices dropped; the busiest rank has "
        f"{uneven:.2f} times the mean\n"
    ) in told
    assert "placement of copies: " in told
    found = json.loads(CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False).stdout)["experts"]
    assert {one["policy"] for one in found.pop("placements")} == {"none", *PLACEMENTS.names}
    assert found == {"dispatch": "alltoall", "dropped": 0.0, "uneven": pytest.approx(uneven)}
