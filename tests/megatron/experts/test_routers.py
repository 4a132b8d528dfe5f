"""Routers of Switch and GShard send as many tokens on two ranks as on one, and the same ones again when recomputed."""

import copy

import pytest
import torch

from tests.ranks import run_ranks
from tests.tolerances import EXACT

EXPERTS, HIDDEN, FFN, TOKENS = 4, 16, 24, 32
GROUP, FACTOR, CPU = 8, 0.75, torch.device("cpu")
SPREAD = {"CP": {"context_parallel_size": 2}, "TP": {"tensor_model_parallel_size": 2}}
ROUTERS = {
    "switch": {"moe_router_topk": 1, "moe_router_pre_softmax": True},
    "gshard": {"moe_router_topk": 2},
    "deepspeed-moe": {
        "moe_router_topk": 1,
        "moe_router_pre_softmax": True,
        "moe_shared_expert_intermediate_size": 12,
        "moe_shared_expert_gate": True,
    },
}


def _config(router, **changes):
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=2,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        num_moe_experts=EXPERTS,
        moe_ffn_hidden_size=FFN,
        moe_aux_loss_coeff=0.01,
        moe_expert_capacity_factor=FACTOR,
        moe_token_dispatcher_type="alltoall",
        params_dtype=torch.float64,
        use_cpu_initialization=True,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        **ROUTERS[router],
        **changes,
    )
    config.moe_router, config.moe_group_tokens = router, GROUP
    return config


def _layer(config):
    """A layer of experts whose weights are drawn from their names in the whole model."""
    from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_cp.megatron.experts.dispatcher import exchanging
    from megatron_cp.megatron.experts.router import routing
    from megatron_cp.megatron.layers.specs import SpecProvider

    spec = get_mlp_module_spec_for_backend(backend=SpecProvider(config), num_experts=EXPERTS, moe_grouped_gemm=False)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    layer = exchanging(routing(spec, config), config)(config=config, pg_collection=groups).double()
    layer.set_layer_number(2)
    first = layer.local_expert_indices[0]
    for name, weight in layer.named_parameters():
        expert, inside = -1, name
        if "local_experts." in name:
            number, _, inside = name.partition("local_experts.")[2].partition(".")
            expert = first + int(number)
        seed = 100 * expert + sum(map(ord, inside)) + 1000
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(seed))
    return layer


def _sample(number):
    generator = torch.Generator().manual_seed(number)
    return torch.randn(2, TOKENS, 1, HIDDEN, generator=generator).double()


def _ran(layer, number, recompute):
    """Output, input's gradient and the tokens that are sent, of one sample."""
    from megatron.core.tensor_parallel import checkpoint

    x, dy = _sample(number)
    x.requires_grad_()
    sent, routing = [], layer.router.routing

    def noted(*args, **kwargs):
        gates, kept = routing(*args, **kwargs)
        sent.append(kept)
        return gates, kept

    layer.router.routing = noted
    output = checkpoint(lambda given: layer(given)[0], False, x) if recompute else layer(x)[0]
    layer.router.routing = routing
    return x, dy, output, sent


def _trained(layer, numbers, recompute=False):
    """The same of some samples, all forwards before all backwards, and the sum of the router's gradients."""
    runs = [_ran(layer, number, recompute) for number in numbers]
    routing = [sent[-1].clone() for *_, sent in runs]
    # in another order than they came
    again = []
    for _, dy, output, _ in reversed(runs):
        before = layer.router.calls
        output.backward(dy)
        again.append(layer.router.calls - before)
    found = {
        "outputs": [output.detach() for _, _, output, _ in runs],
        "inputs": [x.grad for x, *_ in runs],
        "sent": routing,
        "router": layer.router.weight.grad.clone(),
        "again": again,
        "calls": layer.router.calls,
    }
    layer.zero_grad(set_to_none=True)
    return found


def _on(ranks):
    """What `_trained` gives for each router on so many expert-parallel ranks, plain and recomputed; described."""
    from megatron.core import parallel_state

    from megatron_cp.megatron.machine.cpu import cpu_runtime

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=ranks)
    found = {}
    with cpu_runtime():
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(1)
        mine = [torch.distributed.get_rank()] if ranks == 2 else [0, 1]
        for router in ROUTERS:
            config = _config(router, expert_model_parallel_size=ranks)
            found[router] = _trained(_layer(config), mine)
            layer = _layer(copy.copy(config))
            found[router, "recomputed"] = _trained(layer, mine, recompute=True)
            found[router, "said"] = type(layer.router).__name__, layer.router.describe()
            layer.eval()
            found[router, "evaluated"] = _ran(layer, mine[0], False)[2].detach()
        found["mixed"] = _mixed(ranks)
        found["draws"] = _layer(_config("gshard", expert_model_parallel_size=ranks)).router._draws(TOKENS, 1, CPU)
        for name, sizes in SPREAD.items() if ranks == 2 else ():
            parallel_state.destroy_model_parallel()
            parallel_state.initialize_model_parallel(**sizes)
            found[name] = _drawn(sizes)
        torch.distributed.barrier()
    return found


def _mixed(ranks):
    """What a layer makes of a sample with its MLP, and the same from MLP and experts apart."""
    from megatron_cp.megatron.experts.residual import ResidualLayer

    ours, apart = (_layer(_config(router, expert_model_parallel_size=ranks)) for router in ("deepspeed-moe", "switch"))
    assert isinstance(ours, ResidualLayer)
    assert not isinstance(apart, ResidualLayer)
    x, _ = _sample(0)
    found, experts, mlp = ours(x)[0], apart(x)[0], ours.shared_experts
    share = torch.sigmoid(x @ mlp.gate_weight.t())
    mlp.use_shared_expert_gate = False
    return found.detach(), (share * mlp(x) + (1 - share) * experts).detach()


def _drawn(sizes):
    """Positions of this rank's half of a sequence under each algorithm, and the draws for them."""
    from megatron_cp.megatron.experts.router import places

    found = {}
    for algorithm in ("zigzag", "ulysses", "striped"):
        config = _config("gshard", **sizes)
        config.sequence_parallel, config.cp_comm_type = "tensor_model_parallel_size" in sizes, algorithm
        draws = _layer(config).router._draws(TOKENS // 2, 1, CPU)
        found[algorithm] = places(config, TOKENS // 2, CPU), draws
    return found


@pytest.fixture(scope="module")
def one():
    (found,) = run_ranks(1, _on, 1)
    return found


def _close(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max()) < EXACT


@pytest.mark.parametrize("router", ROUTERS)
def test_what_is_recomputed_is_routed_as_the_first_time(one, router):
    plain, again = one[router], one[router, "recomputed"]
    assert one[router, "said"] == ("FirstComeRouter", f"{router}, capacity factor 0.75, groups of 8")
    for name in ("outputs", "sent"):
        for ours, theirs in zip(again[name], plain[name], strict=True):
            assert torch.equal(ours, theirs)
    for ours, theirs in zip([*again["inputs"], again["router"]], [*plain["inputs"], plain["router"]], strict=True):
        assert _close(ours, theirs)
    assert (plain["again"], plain["calls"]) == ([0, 0], 2)
    assert (again["again"], again["calls"]) == ([1, 1], 4)


@pytest.fixture(scope="module")
def two():
    return run_ranks(2, _on, 2)


@pytest.mark.parametrize("router", ROUTERS)
def test_two_expert_parallel_ranks_send_what_one_sends(one, two, router):
    for number, found in enumerate(two):
        for kind in (router, (router, "recomputed")):
            assert torch.equal(found[kind]["sent"][0], one[kind]["sent"][number])
            assert _close(found[kind]["outputs"][0], one[kind]["outputs"][number])
            assert _close(found[kind]["inputs"][0], one[kind]["inputs"][number])
    assert _close(sum(found[router]["router"] for found in two), one[router]["router"])


@pytest.mark.parametrize("spread", SPREAD)
def test_ranks_of_a_sequence_draw_for_their_tokens_what_one_rank_draws(one, two, spread):
    for algorithm in two[0][spread]:
        found = [each[spread][algorithm] for each in two]
        assert sorted(torch.cat([at for at, _ in found]).tolist()) == list(range(TOKENS))
        for at, draws in found:
            assert torch.equal(draws, one["draws"][at])
    first = {algorithm: found[0].tolist() for algorithm, found in two[0][spread].items()}
    assert first["ulysses"][:3] == [0, 1, 2]
    assert (first["striped"][:3] == [0, 2, 4]) == (spread == "CP")


@pytest.mark.parametrize("router", ROUTERS)
def test_tokens_are_dropped_by_arrival_in_each_group(one, router):
    capacity = 3 if router == "gshard" else 2
    for sent in one[router]["sent"]:
        assert sent.view(-1, GROUP, EXPERTS).sum(1).max() == capacity
    chosen = [sent.sum(1) for sent in one[router]["sent"]]
    assert all(0 in per_token for per_token in chosen)
    # evaluation leaves nothing to chance
    same = torch.equal(one[router, "evaluated"], one[router]["outputs"][0])
    assert same == (router != "gshard")


def test_an_mlp_and_the_expert_of_a_token_have_shares_with_a_sum_of_one(one):
    assert _close(*one["mixed"])
