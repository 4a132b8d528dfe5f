"""The real pretrain() with all experts of a rank at once gives what Megatron's experts one by one give."""

import sys
from typing import NamedTuple

import pytest
import torch

from megatron_cp.experts.grouped_mm import lacking
from tests.megatron.pretraining import (
    from_the_rank_with_losses,
    losses_of_each_iteration,
    preset,
    start_from_names,
    tiny,
)
from tests.ranks import run_ranks_with_log
from tests.tolerances import BF16_STEP, GRAD_NORM_DIGITS, LOSS_DIGITS

MOE = """
--cp-kernel auto --num-experts 8 --moe-router-topk 2 --moe-aux-loss-coeff 0.01 --moe-token-dispatcher-type alltoall
--moe-ffn-hidden-size 48
"""
GROUPED = "--moe-grouped-gemm"
EP2 = "--expert-model-parallel-size 2"
DISTRIBUTED = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"
EVERY_STEP = "--moe-placement-interval 1"
OVERLAPPED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
PP2 = "--pipeline-model-parallel-size 2 --pp-schedule zb-h1 --num-layers 4 --global-batch-size 8"


class Run(NamedTuple):
    """Losses and norms of a run, and on one rank the classes of its experts and what their products computed.

    computed:  linears of all experts of a layer, forward, by the product's name
    waited:    weight gradients of all experts that a W computed
    exchanged: exchanges of rows in two hops, forward and backward
    held:      reductions of gradients that have waited for an exchange
    gathered:  gathers of a layer's weights, scatters of their gradients, and bytes of both that this rank has sent
    chosen:    how tokens travelled in each step, where a layer chose
    lent:      copies of weights, and of gradients, that this rank has sent
    routed:    microbatches that routers of ours routed, and routed again
    local:     experts of each layer on this rank
    banner:    lines about experts of all ranks
    """

    log: list
    experts: set[str]
    computed: dict[str, int]
    waited: int
    exchanged: int
    routed: int = 0
    local: tuple[int, ...] = ()
    lent: tuple[int, int] = (0, 0)
    held: int = 0
    gathered: tuple[int, int, int] = (0, 0, 0)
    chosen: tuple[str, ...] = ()
    banner: tuple[str, ...] = ()


def trained_with_experts(flags):
    """Train from named weights and look at the experts afterwards."""
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from megatron_cp.megatron.experts import grouped_mlp
    from megatron_cp.megatron.experts.dispatcher import ExchangingLayer
    from megatron_cp.megatron.experts.placement import PlacedLayer
    from megatron_cp.megatron.experts.tuned import Tuner
    from megatron_cp.megatron.process import pretrain
    from megatron_cp.megatron.process.launch import launched
    from megatron_cp.pipeline.split_backward import WeightQueue

    built, waited, put, taken, take = [], [], WeightQueue.put, {}, Tuner.take

    def noted(queue, run, *keeps):
        if getattr(run, "func", None) is grouped_mlp._weight_half:
            waited.append(run)
        put(queue, run, *keeps)

    def prepare(config):
        start_from_names(config)
        config.pre_wrap_hooks.append(lambda models: built.extend(models) or models)

    def chosen(tuner, step, *rest):
        found = take(tuner, step, *rest)
        taken[step] = str(found)
        return found

    WeightQueue.put, Tuner.take = noted, chosen
    sys.argv = ["pretrain_gpt", *flags]
    with launched(flags), losses_of_each_iteration() as log:
        pretrain.run(prepare=prepare)
        log = from_the_rank_with_losses(log)
    experts = [module for model in built for module in model.modules() if isinstance(module, SequentialMLP)]
    computed = {}
    for product in filter(None, (getattr(module, "product", None) for module in experts)):
        computed[product.name] = computed.get(product.name, 0) + product.calls
    modules = [module for model in built for module in model.modules()]
    layers = [module for module in modules if isinstance(module, ExchangingLayer)]
    tuned = [layer for layer in layers if getattr(layer, "tuner", None)]
    dispatchers = [each for layer in tuned for each in layer.dispatchers.values()]
    dispatchers += [layer.token_dispatcher for layer in layers if layer not in tuned]
    exchanged = sum(each.exchange.calls for each in dispatchers if hasattr(each, "exchange"))
    counts = [
        (layer.gathered.there, layer.gathered.home, layer.gathered.bytes)
        for layer in tuned
        if hasattr(layer, "gathered")
    ]
    gathered = tuple(map(sum, zip(*counts, strict=True))) or (0, 0, 0)
    routed = sum(getattr(module.router, "calls", 0) for module in modules if isinstance(module, MoELayer))
    local = tuple(module.num_local_experts for module in experts)
    lendings = [module.placed.lending for module in modules if isinstance(module, PlacedLayer)]
    lent = sum(lending.there for lending in lendings), sum(lending.home for lending in lendings)
    priorities = {getattr(getattr(module, "token_dispatcher", None), "priority", None) for module in modules}
    held = sum(priority.held for priority in priorities - {None})
    kinds = {type(module).__name__ for module in experts}
    return Run(log, kinds, computed, len(waited), exchanged, routed, local, lent, held, gathered, tuple(taken.values()))


def run(world_size, *flags, without=""):
    grouped = any(name in " ".join(flags) for name in ("grouped-mm", "megablocks"))
    if grouped and (reason := lacking("cpu", torch.bfloat16 if "--bf16" in flags else torch.float32)):
        pytest.skip(f"grouped-mm {reason}")
    ranks, log = run_ranks_with_log(world_size, trained_with_experts, tiny(MOE, *flags, without=without))
    about = tuple(f"[megatron-cp] {what}" for what in ("experts", "exchange", "placement"))
    lines = tuple(line for line in log.splitlines() if line.startswith(about))
    return [found._replace(banner=lines) for found in ranks]


@pytest.fixture(scope="module")
def apart():
    """Runs of Megatron's experts one by one, by their ranks and flags, each made once."""
    runs = {}

    def made(world_size, *flags, without=""):
        if (world_size, flags) not in runs:
            found = run(world_size, *flags, without=without)[0]
            assert (found.experts, found.computed, found.banner) == ({"SequentialMLP"}, {}, ())
            runs[world_size, flags] = found.log
        return runs[world_size, flags]

    return made


def assert_equal(log, expected):
    assert [step["iteration"] for step in log] == [step["iteration"] for step in expected]
    for step, other in zip(log, expected, strict=True):
        assert step["loss"] == pytest.approx(other["loss"], rel=10**-LOSS_DIGITS)
        assert step["grad_norm"] == pytest.approx(other["grad_norm"], rel=10**-GRAD_NORM_DIGITS)


def product_of(flags):
    return "grouped-mm" if "--moe-grouped-product" in flags else "loop"


# 2 linears of 2 layers, of 2 microbatches in 4 iterations, unless the microbatches are other ranks'
CASES = {
    "one rank": (1, "", 32),
    "EP 2, grouped-mm": (2, f"{EP2} --moe-grouped-product megablocks", 16),
    "TP 2 x EP 2, distributed optimizer, overlapped": (
        4,
        f"{TP2} {EP2} --expert-tensor-parallel-size 1 {OVERLAPPED}",
        16,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_experts_at_once_train_as_experts_one_by_one_on_one_rank(apart, case):
    world_size, parallel, computed = CASES[case]
    ranks = run(world_size, GROUPED, parallel)
    assert_equal(ranks[0].log, apart(1))
    name = product_of(parallel)
    for found in ranks:
        assert (found.experts, found.computed, found.waited) == ({"GroupedMLP"}, {name: computed}, 0)
    # on rank 0 alone
    (line,) = ranks[0].banner
    assert line.startswith(f"[megatron-cp] experts: {4 if EP2 in parallel else 8} on a rank, product {name}")
    assert ("auto: torch's grouped-mm on cpu loops over copies of the weights" in line) == (name == "loop")


ALIKE = {
    "PP 2 zb-h1": (2, PP2, ""),
    "TP 2, experts over both, padded to the capacity": (
        2,
        f"{TP2} --expert-tensor-parallel-size 2 --moe-expert-capacity-factor 1.0 --moe-pad-expert-input-to-capacity",
        "",
    ),
    "shared experts, no gate, tokens dropped": (
        1,
        "--moe-shared-expert-intermediate-size 32 --squared-relu --moe-expert-capacity-factor 0.5",
        "--swiglu",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ALIKE)
def test_experts_at_once_train_as_experts_one_by_one_on_the_same_ranks(apart, case):
    world_size, flags, without = ALIKE[case]
    ranks = run(world_size, GROUPED, flags, without=without)
    assert_equal(ranks[0].log, apart(world_size, flags, without=without))
    for found in ranks:
        assert found.experts == {"GroupedMLP"}
        assert found.computed["loop"] > 0
    # a schedule with W leaves weight gradients to it, but for those that come right after their I
    assert (sum(found.waited for found in ranks) > 0) == ("zb-h1" in flags)


@pytest.mark.slow
def test_bf16_differs_by_rounding_alone(apart):
    found, expected = run(2, GROUPED, EP2, "--bf16")[0], apart(2, EP2, "--bf16")
    assert (found.experts, set(found.computed)) == ({"GroupedMLP"}, {"loop"})
    for step, other in zip(found.log, expected, strict=True):
        assert step["loss"] == pytest.approx(other["loss"], rel=BF16_STEP)
        assert step["grad_norm"] == pytest.approx(other["grad_norm"], rel=BF16_STEP)


# an expert has places for as many tokens of a group of 8 as an even share
ONE_OF_A_TOKEN = "--moe-router-topk 1 --moe-router-pre-softmax --moe-expert-capacity-factor 1.0 --moe-group-tokens 8"
SWITCH = f"--moe-router switch {ONE_OF_A_TOKEN}"
GSHARD = "--moe-router gshard --moe-expert-capacity-factor 1.0 --moe-group-tokens 8"
BESIDE = (
    f"--moe-router deepspeed-moe {ONE_OF_A_TOKEN} --moe-shared-expert-intermediate-size 48 --moe-shared-expert-gate"
    " --moe-layer-experts 2:16"
)
# router, flags beside it, microbatches of layers that a rank routes, linears of all experts that it computes
ROUTED = {
    "switch, EP 2, overlapped, recomputed activation": (
        SWITCH,
        f"{EP2} {GROUPED} {OVERLAPPED} --recompute-granularity selective --recompute-modules moe_act",
        8,
        16,
    ),
    "gshard, CP 2 x EP 2, full recompute": (
        GSHARD,
        f"--context-parallel-size 2 {EP2} {GROUPED} --recompute-granularity full --recompute-method uniform "
        "--recompute-num-layers 1",
        32,
        64,
    ),
    "gshard, PP 2": (GSHARD, "--pipeline-model-parallel-size 2 --pp-schedule 1f1b", 8, 0),
    "deepspeed-moe, EP 2 in 2 pieces, flexmoe": (
        BESIDE,
        f"{EP2} --moe-pieces 2 {preset('flexmoe')} {EVERY_STEP}",
        8,
        0,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ROUTED)
def test_a_router_trains_as_on_one_rank(apart, case):
    router, flags, routed, computed = ROUTED[case]
    ranks = run(2, router, flags)
    assert_equal(ranks[0].log, apart(1, router))
    for found in ranks:
        assert found.routed == routed
        assert sum(found.computed.values()) == computed
        assert found.experts == {"GroupedMLP" if computed else "SequentialMLP"}
        if router == BESIDE:
            assert found.local == (4, 8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved", "loaded", "router"),
    [(GROUPED, "", ()), ("", GROUPED, (GSHARD,))],
    ids=["at once to apart", "back, with draws of steps and not of a run"],
)
def test_a_checkpoint_moves_between_experts_at_once_and_apart(apart, tmp_path, saved, loaded, router):
    length = "--lr-decay-iters 4"
    save = f"--train-iters 2 {length} --save {tmp_path} --save-interval 2"
    load = f"{length} --load {tmp_path} --use-checkpoint-opt-param-scheduler"
    first = run(2, saved, EP2, DISTRIBUTED, save, *router)[0]
    second = run(2, loaded, EP2, DISTRIBUTED, load, *router)[0]
    kinds = tuple({"GroupedMLP" if flags else "SequentialMLP"} for flags in (saved, loaded))
    assert (first.experts, second.experts) == kinds
    assert_equal([*first.log, *second.log], apart(1, *router))


EP4 = "--expert-model-parallel-size 4 --global-batch-size 8"
GROUPS_OF_TWO = "--moe-comm-type fastermoe --moe-group-ranks 2"
TWO_HOPS = "--moe-comm-type two-hop --moe-ranks-per-node 2"
SHARED = "--moe-shared-expert-intermediate-size 32 --moe-expert-capacity-factor 0.5"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "flags", "alike", "said", "calls"),
    [
        (
            2,
            f"{EP2} {GROUPED} {OVERLAPPED} {preset('fastermoe')} {EVERY_STEP}",
            (1,),
            "fastermoe, in 2 groups of 1 rank",
            2,
        ),
        # a bucket for nearly each weight
        (
            4,
            f"{EP2} {OVERLAPPED} --global-batch-size 8 --moe-comm-type lina --ddp-bucket-size 1000",
            (1, "--global-batch-size 8"),
            "lina, in 2 pieces, before reductions of gradients",
            2,
        ),
        # on one node two hops cost as much, and the simpler one is taken
        (4, f"{PP2} {EP2} {preset('tutel')} --moe-pieces 2", (2, PP2), "pipelined, in 2 pieces", 4),
        (4, f"{EP4} {SHARED} {GROUPS_OF_TWO}", (4, EP4, SHARED), "fastermoe, in 2 groups of 2 ranks", 2),
        (4, f"{EP4} {SHARED} {TWO_HOPS} --moe-pieces 3", (4, EP4, SHARED), "two-hop, 2 nodes of 2, in 3 pieces", 3),
    ],
    # two hops of a whole layer are compared with Megatron's exchange in test_pieces
    ids=[
        "groups of a rank, copies, overlapped",
        "exchanges before reductions",
        "tutel's pieces, zb-h1",
        "groups of two ranks, shared experts, tokens dropped",
        "two hops in pieces, shared experts, tokens dropped",
    ],
)
def test_two_hops_and_pieces_train_as_megatrons_own_exchange(apart, ranks, flags, alike, said, calls):
    found = run(ranks, flags)
    assert_equal(found[0].log, apart(*alike))
    # tokens and probabilities there, tokens home, and as much backward, of 2 layers in 4 iterations; `calls` for the
    # pieces of all microbatches
    assert {each.exchanged for each in found} == {6 * 2 * 4 * calls}
    assert {each.held > 0 for each in found} == {"lina" in flags}
    assert f"[megatron-cp] exchange of experts: {said}" in {line for each in found for line in each.banner}


PLACED = f"{preset('lina')} {EVERY_STEP}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "flags", "alike", "slots", "layers"),
    [
        (4, f"{PP2} {EP2} {DISTRIBUTED} --moe-comm-type megatron --moe-replica-slots 2", (2, PP2), 2, 4),
        (
            4,
            f"{TP2} --context-parallel-size 2 {EP2} --expert-tensor-parallel-size 1 {GROUPED} {OVERLAPPED} "
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
            (1,),
            1,
            2,
        ),
    ],
    ids=["zb-h1, distributed optimizer", "TP 2 x CP 2, pieces, overlapped, full recompute"],
)
def test_copies_of_experts_whose_plans_change_train_as_no_copies(apart, ranks, flags, alike, slots, layers):
    found = run(ranks, PLACED, flags)
    assert_equal(found[0].log, apart(*alike))
    # weights that leave at the layer itself, and not while the one before computes, change no digit
    at_the_layer = run(ranks, PLACED, flags, "--moe-copies-ahead 0")
    assert [each.lent for each in at_the_layer] == [each.lent for each in found]
    for step, other in zip(found[0].log, at_the_layer[0].log, strict=True):
        assert (step["loss"], step["grad_norm"]) == (other["loss"], other["grad_norm"])
    # weights once in each of the 3 steps that have a plan, gradients after each of 2 microbatches
    there, home = (sum(column) for column in zip(*(each.lent for each in found), strict=True))
    assert there >= 3 * layers
    assert home == 2 * there
    (line,) = {line for each in found for line in each.banner if "placement" in line}
    spare = "2 spare slots each" if slots == 2 else "1 spare slot each"
    assert line == f"[megatron-cp] placement of experts: lina, every step; 2 ranks with 4 experts and {spare}"
