"""A layer of experts with our exchange, whole or in pieces, computes what Megatron's does."""

import copy

import torch

from tests.ranks import run_ranks
from tests.tolerances import EXACT

EXPERTS, HIDDEN, FFN, TOKENS = 4, 16, 24, 10
DROPPED = {"moe_expert_capacity_factor": 0.5}
VARIANTS = {
    "whole, in two hops": (1, {}),
    "two pieces": (2, {}),
    "three uneven pieces, tokens dropped": (3, DROPPED),
    "two pieces, experts at once": (2, {"moe_grouped_gemm": True}),
    "groups of a rank, tokens dropped, experts at once": ("groups", {**DROPPED, "moe_grouped_gemm": True}),
    "groups of a rank, inputs padded": (
        "groups",
        {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True},
    ),
    "more pieces than tokens, a shared expert": (12, {"moe_shared_expert_intermediate_size": 8}),
}


def _layers(pieces, changes):
    """Megatron's layer, and the one in pieces with its parameters."""
    from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_cp.megatron.experts.dispatcher import exchanging
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
        expert_model_parallel_size=2,
        params_dtype=torch.float64,
        use_cpu_initialization=True,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        **changes,
    )
    cut = copy.copy(config)
    if pieces == "groups":
        cut.moe_comm_type, cut.moe_group_ranks = "fastermoe", 1
    else:
        # not wrapped, so that no reduction waits
        cut.moe_pieces, cut.moe_comm_type = pieces, "two-hop" if pieces == 1 else "lina"
    spec = get_mlp_module_spec_for_backend(
        backend=SpecProvider(config), num_experts=EXPERTS, moe_grouped_gemm=config.moe_grouped_gemm
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    stock, ours = (
        exchanging(spec, each)(config=each, layer_number=1, pg_collection=groups).double() for each in (config, cut)
    )
    first = 10 * torch.distributed.get_rank()
    for at, (name, weight) in enumerate(stock.named_parameters()):
        seed = at + (first if ".local_experts." in name else 0)
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(seed))
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def _ran(layer, seed, recompute=False):
    """Output and gradients of input and parameters."""
    from megatron.core.tensor_parallel import checkpoint

    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, 1, HIDDEN, generator=generator).double().requires_grad_()
    output, bias = (checkpoint(lambda given: layer(given)[0], False, x), None) if recompute else layer(x)
    assert bias is None
    output.backward(torch.randn(TOKENS, 1, HIDDEN, generator=generator).double())
    gradients = [weight.grad for weight in layer.parameters()]
    layer.zero_grad(set_to_none=True)
    return [output.detach(), x.grad, *gradients]


def _error(ours, theirs):
    """Largest difference, relative to the largest element."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))


def _in_halves(layer, rank):
    """What `_ran` gives with weight gradients that wait for their turn, and how many did."""
    from megatron_cp.megatron.pipeline.split_linear import bound_queue

    queue, waited = bound_queue(), []
    queue.on_put = waited.append
    with queue.step():
        # as a schedule, which clears no gradient between an I and its W
        zero_grad, layer.zero_grad = layer.zero_grad, lambda **_: None
        with queue.put_off("I"):
            found = _ran(layer, rank)
        queue.run("I")
        given = [weight.grad for weight in layer.parameters()]
        layer.zero_grad = zero_grad
    layer.zero_grad(set_to_none=True)
    return [*found[:2], *given], len(waited)


def _errors(variants):
    """Largest relative error of each variant, its description and its exchanges; the same recomputed and in halves."""
    from megatron.core import parallel_state

    from megatron_cp.megatron import hooks
    from megatron_cp.megatron.machine.cpu import cpu_runtime

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    found, rank = {}, torch.distributed.get_rank()
    with cpu_runtime(), hooks.apply(["weight-queue"]):
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(1)
        for variant, (pieces, changes) in variants.items():
            stock, ours = _layers(pieces, changes)
            expected, dispatcher = _ran(stock, rank), ours.token_dispatcher
            worst = _error(_ran(ours, rank), expected)
            calls = dispatcher.exchange.calls
            halves, waited = _in_halves(ours, rank)
            worst = max(worst, _error(halves, expected), _error(_ran(ours, rank, recompute=True), expected))
            found[variant] = worst, type(stock).__name__, dispatcher.describe(), calls, waited
        torch.distributed.barrier()
    return found


def _said(pieces):
    if pieces == 1:
        return "two-hop, 2 ranks on one node, which is Megatron's exchange"
    if pieces == "groups":
        return "fastermoe, in 2 groups of 1 rank"
    return f"lina, in {pieces} pieces; no reduction waits without --overlap-grad-reduce"


def test_a_layer_in_pieces_computes_what_megatrons_does():
    for found in run_ranks(2, _errors, VARIANTS):
        for variant, (worst, kind, said, calls, waited) in found.items():
            pieces, changes = VARIANTS[variant]
            assert worst < EXACT, variant
            # tokens and probabilities there, tokens home, and as much backward
            times = 2 if pieces == "groups" else pieces
            assert (kind, said, calls) == ("MoELayer", _said(pieces), 6 * times)
            # two linears of two experts, or of both at once, and of the shared one
            experts = 1 if "moe_grouped_gemm" in changes else 2
            assert waited == 2 * experts * times + 2 * ("moe_shared_expert_intermediate_size" in changes), variant
