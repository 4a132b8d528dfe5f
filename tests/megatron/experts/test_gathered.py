"""A layer whose ranks gather the weights of the experts that they share computes what Megatron's does with tokens."""

import copy

import torch

from tests.megatron.experts.test_pieces import _error, _in_halves, _ran
from tests.ranks import run_ranks
from tests.tolerances import EXACT

EXPERTS, HIDDEN, FFN, RANKS, SHARED = 4, 16, 24, 4, 2
DROPPED = {"moe_expert_capacity_factor": 0.5}
VARIANTS = {
    "one by one": (1, {}),
    "at once, in two pieces": (2, {"moe_grouped_gemm": True}),
    "three pieces, tokens dropped, a shared expert": (3, {**DROPPED, "moe_shared_expert_intermediate_size": 8}),
    "padded to the capacity": (1, {**DROPPED, "moe_pad_expert_input_to_capacity": True}),
    "no gate": (1, {"gated_linear_unit": False, "moe_grouped_gemm": True}),
}


def _layers(pieces, changes):
    """Megatron's layer, and the one that gathers weights with its parameters."""
    from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_cp.megatron.experts.dispatcher import exchanging
    from megatron_cp.megatron.experts.tuned import tuning
    from megatron_cp.megatron.layers.specs import SpecProvider

    given = {
        "num_moe_experts": EXPERTS,
        "moe_ffn_hidden_size": FFN,
        "moe_router_topk": 2,
        "moe_aux_loss_coeff": 0.01,
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": RANKS // SHARED,
        "expert_tensor_parallel_size": SHARED,
        "params_dtype": torch.float64,
        "use_cpu_initialization": True,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
    }
    config = TransformerConfig(num_layers=1, hidden_size=HIDDEN, num_attention_heads=2, **{**given, **changes})
    ours = copy.copy(config)
    ours.moe_gather, ours.moe_pieces = "weights", pieces
    if pieces > 1:
        ours.moe_comm_type = "lina"
    spec = get_mlp_module_spec_for_backend(
        backend=SpecProvider(config), num_experts=EXPERTS, moe_grouped_gemm=config.moe_grouped_gemm
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    stock, whole = (
        tuning(exchanging(spec, each), each)(config=each, layer_number=1, pg_collection=groups).double()
        for each in (config, ours)
    )
    first = 10 * torch.distributed.get_rank()
    for at, (name, weight) in enumerate(stock.named_parameters()):
        seed = at + (first if ".local_experts." in name else 0)
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(seed))
    whole.load_state_dict(stock.state_dict())
    return stock, whole


def _errors(variants):
    """Largest relative error of each variant, what its layer says, gathers, and weight gradients that have waited."""
    from megatron.core import parallel_state

    from megatron_cp.experts.priority import ExchangePriority
    from megatron_cp.megatron import hooks
    from megatron_cp.megatron.experts import grouped_mlp
    from megatron_cp.megatron.machine.cpu import cpu_runtime

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=RANKS // SHARED, expert_tensor_parallel_size=SHARED
    )
    found, rank = {}, torch.distributed.get_rank()
    widths, choose = set(), grouped_mlp.choose
    grouped_mlp.choose = lambda *given: widths.add(tuple(given[-1])) or choose(*given)
    with cpu_runtime(), hooks.apply(["weight-queue"]):
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(1)
        for variant, (pieces, changes) in variants.items():
            stock, ours = _layers(pieces, changes)
            if pieces > 1:
                # as where the model is wrapped
                ours.token_dispatcher.priority = ExchangePriority()
            first = ours.token_dispatcher
            expected = _ran(stock, rank)
            worst = _error(_ran(ours, rank), expected)
            counted = ours.gathered.there, ours.gathered.home, ours.gathered.bytes
            halves, waited = _in_halves(ours, rank)
            worst = max(worst, _error(halves, expected), _error(_ran(ours, rank, recompute=True), expected))
            sizes = sum(weight.numel() for weight in ours.experts.parameters())
            assert ours.token_dispatcher is not first
            assert getattr(ours.token_dispatcher, "priority", None) is getattr(first, "priority", None), variant
            found[variant] = worst, type(ours).__name__, ours.describe(), counted, sizes, waited
        torch.distributed.barrier()
    # rows of a shard may be no multiple of 16 bytes where those of the whole are, in a step that gathers tokens
    assert widths == {(HIDDEN, FFN // SHARED)}
    return found


def test_a_layer_that_gathers_weights_computes_what_megatrons_does():
    for found in run_ranks(RANKS, _errors, VARIANTS):
        for variant, (worst, kind, said, counted, sizes, waited) in found.items():
            pieces, changes = VARIANTS[variant]
            assert worst < EXACT, variant
            assert kind == "TunedLayer"
            assert (f"lina, in {pieces} pieces, before reductions of gradients" in said) == (pieces > 1)
            assert said.endswith("weights of 2 experts are gathered from 2 ranks, and tokens stay")
            # weights there and gradients home, in float64
            assert counted == (1, 1, 2 * 8 * (SHARED - 1) * sizes), variant
            # gradients of gathered weights go to their shards at once
            assert waited == 2 * ("moe_shared_expert_intermediate_size" in changes), variant
