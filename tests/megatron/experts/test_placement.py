"""A layer of experts with copies on other ranks computes what Megatron's does, whatever the plans of its steps."""

import copy
from types import SimpleNamespace

import pytest
import torch

from megatron_cp.experts.slots import SlotPlan, Slots, lent_bytes
from tests.megatron.experts.test_pieces import DROPPED, EXPERTS, FFN, HIDDEN, _error, _in_halves, _ran
from tests.ranks import run_ranks
from tests.tolerances import EXACT

GROUPED = {"moe_grouped_gemm": True}
IN_GROUPS = "one by one, in groups of a rank, tokens dropped"
# on 2 ranks the second plan has one that only lends; on 4 the first is a shadow, and copies of the second share tokens
PLANS = {
    2: (((2,), (0, 1)), ((), (0,)), ((), ())),
    4: (((), (0,), (0,), (0,)), ((1, 3), (), (0, 1), (0, 2))),
}
VARIANTS = {
    "at once, in two pieces, tokens dropped": {**GROUPED, **DROPPED, "pieces": 2},
    "one by one": {},
    "one by one, in two pieces, a shared expert": {"pieces": 2, "moe_shared_expert_intermediate_size": 8},
    IN_GROUPS: {**DROPPED, "hops": "fastermoe"},
    "at once, in two hops": {**GROUPED, "hops": "two-hop"},
}
BYTES = 8 * 3 * HIDDEN * FFN
MICROBATCHES = 2


def _layers(ranks, pieces=1, hops="megatron", **changes):
    """Megatron's layer, and the one with copies with its parameters."""
    from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_cp.megatron.experts.dispatcher import exchanging
    from megatron_cp.megatron.experts.placement import placing
    from megatron_cp.megatron.layers.specs import SpecProvider

    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        num_moe_experts=EXPERTS,
        moe_ffn_hidden_size=FFN,
        moe_router_topk=2,
        moe_aux_loss_coeff=0.01,
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=ranks,
        params_dtype=torch.float64,
        use_cpu_initialization=True,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        **changes,
    )
    wide = copy.copy(config)
    wide.moe_pieces, wide.moe_comm_type, wide.moe_ranks_per_node = pieces, hops, 2 if hops == "two-hop" else None
    wide.moe_placement, wide.moe_replica_slots = "lina", 2
    spec = get_mlp_module_spec_for_backend(
        backend=SpecProvider(config), num_experts=EXPERTS, moe_grouped_gemm=config.moe_grouped_gemm
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    stock, ours = (
        placing(exchanging(spec, each), each)(config=each, layer_number=1, pg_collection=groups).double()
        for each in (config, wide)
    )
    first = 10 * torch.distributed.get_rank()
    for at, (name, weight) in enumerate(stock.named_parameters()):
        seed = at + (first if ".local_experts." in name else 0)
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(seed))
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def _step(layer, rank):
    """What microbatches of a step give, and an evaluation after it with other weights."""
    found = [_ran(layer, rank + 10 * micro) for micro in range(MICROBATCHES)]
    layer.eval()
    with torch.no_grad():
        for weight in layer.parameters():
            weight.add_(1.0)
        after = layer(torch.ones(3, 1, HIDDEN, dtype=torch.float64))[0]
        for weight in layer.parameters():
            weight.sub_(1.0)
    layer.train()
    return [*(each for microbatch in found for each in microbatch), after]


def _errors(ranks, variants, plans):
    """For each variant, the largest error of each plan's step, copies and bytes that this rank has sent, tokens."""
    from megatron.core import parallel_state

    from megatron_cp.megatron import hooks
    from megatron_cp.megatron.experts import placement
    from megatron_cp.megatron.machine.cpu import cpu_runtime

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=ranks)
    rank, run = torch.distributed.get_rank(), SimpleNamespace(curr_iteration=0)
    placement.args_of_run = lambda: run
    found = {}
    with cpu_runtime(), hooks.apply(["weight-queue"]):
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(1)
        for variant, changes in variants.items():
            stock, ours = _layers(ranks, **changes)
            placed = ours.placed
            placed.placing.interval = 1000
            expected, steps = _step(stock, rank), []
            for hosted in plans:
                placed.placing.plan = placed.plan._replace(hosted=hosted)
                run.curr_iteration += 1
                before = placed.lending.there, placed.lending.home, placed.lending.bytes
                worst = _error(_step(ours, rank), expected)
                counted = placed.lending.there, placed.lending.home, placed.lending.bytes
                steps.append((worst, *(now - then for now, then in zip(counted, before, strict=True))))
                # without what is counted
                halves, waited = _in_halves(ours, rank)
                again = _ran(ours, rank, recompute=True)
                assert waited > 0
                assert max(_error(halves, expected[: len(halves)]), _error(again, expected[: len(again)])) < EXACT
            keys = list(ours.state_dict()) == list(stock.state_dict())
            found[variant] = steps, type(ours).__name__, ours.describe(), keys
        torch.distributed.barrier()
    return found


@pytest.mark.parametrize(
    ("ranks", "variants"),
    [
        (2, ["at once, in two pieces, tokens dropped"]),
        pytest.param(
            2, ["one by one", "one by one, in two pieces, a shared expert", IN_GROUPS], marks=pytest.mark.slow
        ),
        pytest.param(4, ["at once, in two hops"], marks=pytest.mark.slow),
    ],
    ids=["two ranks", "two ranks, one by one", "two nodes"],
)
def test_any_plan_that_changes_between_steps_computes_what_no_plan_does(ranks, variants):
    plans = [SlotPlan(Slots(EXPERTS, ranks, 2), hosted) for hosted in PLANS[ranks]]
    all_ranks = run_ranks(ranks, _errors, ranks, {name: VARIANTS[name] for name in variants}, PLANS[ranks])
    for variant in variants:
        for number, plan in enumerate(plans):
            sent = [found[variant][0][number] for found in all_ranks]
            assert max(worst for worst, *_ in sent) < EXACT, variant
            # weights once in a step and once in its evaluation, gradients of each microbatch
            assert sum(there for _, there, _, _ in sent) == 2 * plan.copies
            assert sum(home for _, _, home, _ in sent) == MICROBATCHES * plan.copies
            of_evaluation = plan.copies * BYTES
            assert sum(count for *_, count in sent) == lent_bytes(plan, BYTES, MICROBATCHES) + of_evaluation
        for found in all_ranks:
            kind, said, keys = found[variant][1:]
            assert (kind, keys) == ("PlacedLayer", True)
            assert said == (
                f"lina, every 1000 steps; {ranks} ranks with {EXPERTS // ranks} experts and 2 spare slots each"
            )
