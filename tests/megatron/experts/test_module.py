"""GroupedMLP computes what Megatron's SequentialMLP does from the same parameters, in every variant of the layer."""

from functools import partial

import pytest
import torch

from megatron_cp.experts import GROUPED_MM, LOOP
from megatron_cp.experts.grouped_mm import lacking
from tests.ranks import run_ranks
from tests.tolerances import EXACT

EXPERTS, HIDDEN, FFN = 4, 16, 24
DTYPES = {LOOP: torch.float64, GROUPED_MM: torch.float32}
SINGLE = 1e-5
SIZES = [(5, 0, 7, 4), (0, 0, 0, 9), (0, 0, 0, 0)]
GATED = {"gated_linear_unit": True}
# on one rank Megatron's experts with biases cannot run: they are written into a view
BIASED = {"add_bias_linear": True, "expert_model_parallel_size": 2}
ONE_EACH = {"moe_router_topk": 1, "moe_router_pre_softmax": True}
VARIANTS = {
    "gated": GATED,
    "clamped, with an offset": {**GATED, "activation_func_clamp_value": 0.5, "glu_linear_offset": 1.0},
    "probabilities on the input": {**GATED, "moe_apply_probs_on_input": True, **ONE_EACH},
    "biases": {**GATED, **BIASED},
    "biases, plain": BIASED,
    "recomputed": {**GATED, "recompute_granularity": "selective", "recompute_modules": ["moe_act"]},
    "one expert": {**GATED, "experts": 1},
}


def _both(changes, product):
    """Megatron's experts and ours, with the parameters of Megatron's."""
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_cp.megatron.layers.specs import SpecProvider

    changes = dict(changes)
    experts = changes.pop("experts", EXPERTS)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        num_moe_experts=EXPERTS,
        moe_ffn_hidden_size=FFN,
        moe_grouped_gemm=True,
        params_dtype=DTYPES[product],
        use_cpu_initialization=True,
        **{"add_bias_linear": False, "activation_func": torch.nn.functional.silu, **changes},
    )
    config.moe_grouped_product = product
    groups = ProcessGroupCollection.use_mpu_process_groups()
    made = []
    for provider in (LocalSpecProvider(), SpecProvider(config)):
        build = provider.grouped_mlp_modules(True)
        made.append(build(experts, config, pg_collection=groups).to(DTYPES[product]))
    sequential, grouped = made
    for at, weight in enumerate(sequential.parameters()):
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(at))
    grouped.load_state_dict(sequential.state_dict())
    return sequential, grouped


def _ran(module, sizes):
    """Output and gradients of the tokens, probabilities and parameters."""
    generator = torch.Generator().manual_seed(1)
    rows, dtype = sum(sizes), next(module.parameters()).dtype
    x, probs = torch.randn(rows, HIDDEN, generator=generator).to(dtype), torch.rand(rows, generator=generator).to(dtype)
    x.requires_grad_()
    probs.requires_grad_()
    output, bias = module(x, torch.tensor(sizes), probs)
    assert bias is None
    output.backward(torch.randn(rows, HIDDEN, generator=generator).to(dtype))
    gradients = [weight.grad for weight in module.parameters()]
    module.zero_grad(set_to_none=True)
    return [output.detach(), x.grad, probs.grad, *gradients]


def _error(ours, theirs):
    """Largest difference, relative to the largest element where there is one."""
    if theirs is None or not theirs.any():
        return 0.0 if ours is None or not ours.any() else 1.0
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _errors(variants, products):
    """Largest error of each variant under each product, and the products that were called."""
    from megatron.core import parallel_state

    from megatron_cp.megatron.machine.cpu import cpu_runtime

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    found = {}
    with cpu_runtime():
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(1)
        for variant, changes in variants.items():
            for product in products:
                sequential, grouped = _both(changes, product)
                assert list(sequential.state_dict()) == list(grouped.state_dict())
                worst = 0.0
                for sizes in SIZES:
                    of_experts = sizes[-grouped.num_local_experts :]
                    for ours, theirs in zip(_ran(grouped, of_experts), _ran(sequential, of_experts), strict=True):
                        worst = max(worst, _error(ours, theirs))
                found[variant, product] = (worst, type(grouped).__name__, grouped.product.name, grouped.product.calls)
    return found


def _queued(changes):
    """Gradients of a whole backward and of one in two halves, and how many weight halves waited."""
    from megatron.core import parallel_state

    from megatron_cp.megatron import hooks
    from megatron_cp.megatron.machine.cpu import cpu_runtime
    from megatron_cp.megatron.pipeline.split_linear import bound_queue

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    with cpu_runtime(), hooks.apply(["weight-queue"]):
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(1)
        _, grouped = _both(changes, LOOP)
        whole = _ran(grouped, SIZES[0])
        queue, waited = bound_queue(), []
        queue.on_put = waited.append
        with queue.step():
            with queue.put_off("I"):
                halves = _ran(grouped, SIZES[0])
            before = [weight.grad for weight in grouped.parameters()]
            queue.run("I")
            weights = [weight.grad for weight in grouped.parameters()]
        tokens = [torch.equal(*pair) for pair in zip(halves[:3], whole[:3], strict=True)]
        matrices = [torch.equal(late, early) for late, early in zip(weights, whole[3:], strict=True) if early.dim() > 1]
        return tokens, before, matrices, [[tuple(kept.shape) for kept in each] for each in waited]


def test_experts_together_compute_what_experts_one_by_one_do():
    products = [LOOP, *([] if lacking("cpu", torch.float32) else [GROUPED_MM])]
    (found,) = run_ranks(1, _errors, VARIANTS, products)
    for (variant, product), (worst, kind, name, calls) in found.items():
        # torch's grouped product takes no float64
        assert worst < (EXACT if product == LOOP else SINGLE), (variant, product)
        # two linears for each list of sizes
        assert (kind, name, calls) == ("GroupedMLP", product, 2 * len(SIZES))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["gated", "biases", "recomputed"])
def test_weight_gradients_wait_for_their_turn(variant):
    ((tokens, before, matrices, waited),) = run_ranks(1, partial(_queued, VARIANTS[variant]))
    assert tokens == [True] * 3
    assert all(gradient is None for gradient in before)
    assert matrices == [True] * 2 * EXPERTS
    # of the second linear first: dy and x of all experts at once
    assert waited == [[(16, HIDDEN), (16, FFN)], [(16, 2 * FFN), (16, HIDDEN)]]
