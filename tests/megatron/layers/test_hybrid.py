"""HybridModel through our ready stack spec: attention and MLP layers without TransformerEngine."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_cp.errors import Refused
from megatron_cp.megatron.experts.dispatcher import ExchangingLayer
from megatron_cp.megatron.layers import hybrid
from megatron_cp.megatron.layers.attention import CoreAttention
from megatron_cp.megatron.layers.latent import LatentSelfAttention
from megatron_cp.megatron.layers.norm import Norm
from megatron_cp.megatron.layers.te_attention import TECoreAttention
from megatron_cp.megatron.spec import hybrid_stack_spec
from tests.megatron.spec_run import grad_norms, losses, train
from tests.megatron.test_parity import LATENT
from tests.ranks import RankError, run_ranks, run_ranks_with_log

PATTERN = "--hybrid-layer-pattern *-*- --num-layers 4"
NAME = "hybrid_stack_spec"


EXPERTS = "--num-experts 4 --moe-router-topk 2 --moe-aux-loss-coeff 0 --moe-token-dispatcher-type"


def trained(world_size: int, flags: str, pattern: str = PATTERN) -> str:
    return run_ranks_with_log(world_size, train, f"{pattern} {flags}", None, NAME)[1]


def test_spec_is_a_ready_object() -> None:
    assert isinstance(hybrid_stack_spec, ModuleSpec)


def test_trains_the_same_on_several_ranks() -> None:
    whole = trained(1, "")
    assert len(losses(whole)) == 4
    assert "[megatron-cp] layers 1, 3: zigzag" in whole
    log = trained(4, "--context-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel")
    assert losses(log) == pytest.approx(losses(whole), rel=1e-6)
    assert grad_norms(log) == pytest.approx(grad_norms(whole), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "experts"), [("*-*-", ""), ("*E*E", f"{EXPERTS} alltoall")], ids=["*-*-", "*E*E"])
def test_patterns_on_four_ranks_train_as_on_one_over_five_steps(pattern: str, experts: str) -> None:
    flags = f"--hybrid-layer-pattern {pattern} --num-layers 4 --train-iters 5 {experts}"
    whole = trained(1, "--cp-comm-type p2p", flags)
    log = trained(4, "--context-parallel-size 4" + " --expert-model-parallel-size 2" * bool(experts), flags)
    assert len(losses(whole)) == 5
    assert losses(log) == pytest.approx(losses(whole), rel=1e-6)
    assert grad_norms(log) == pytest.approx(grad_norms(whole), rel=1e-3)
    assert "[megatron-cp] layers 1, 3: zigzag" in log


@pytest.mark.slow
def test_latents_of_a_pattern_with_experts_resume_at_another_degree(tmp_path: Path) -> None:
    model = f"--hybrid-layer-pattern *E*E --num-layers 4 --num-query-groups 4 {LATENT} {EXPERTS} alltoall"
    flags = f"{model} --cp-comm-type zigzag --cp-latent"
    save = f"--context-parallel-size 2 --save {tmp_path} --save-interval 2"
    how = (_sends_latents, NAME, ("flags", "checks"), "--group-query-attention")
    _, unbroken = run_ranks_with_log(2, train, f"{flags} {save}", *how)
    _, resumed = run_ranks_with_log(1, train, f"{flags} --load {tmp_path} --ckpt-step 2", *how)
    assert len(losses(unbroken)) == 4
    third, fourth = losses(unbroken)[2:]
    # Megatron prints the mean of a run's first two losses as the second one
    assert losses(resumed) == pytest.approx([third, (third + fourth) / 2], rel=1e-6)
    assert grad_norms(resumed) == pytest.approx(grad_norms(unbroken)[2:], rel=1e-3)


def _sends_latents(models: list[Any]) -> None:
    layers = models[0].module.decoder.layers
    assert [type(layer.self_attention) for layer in layers[::2]] == [LatentSelfAttention] * 2


def _parts(models: list[Any]) -> None:
    stack = models[0].module.decoder
    assert isinstance(stack.final_norm, Norm)
    assert isinstance(stack.layers[0].self_attention.core_attention, CoreAttention)
    assert isinstance(stack.layers[0].input_layernorm, Norm)
    assert isinstance(stack.layers[1].pre_mlp_layernorm, Norm)


def test_final_norm_and_attention_are_ours() -> None:
    run_ranks(1, train, f"{PATTERN} --train-iters 1", _parts, NAME)


def test_with_transformer_engine_the_stock_stack_gets_our_attention_and_exchange() -> None:
    edited = hybrid._stock_submodules(SimpleNamespace(moe_comm_type="two-hop"))  # type: ignore[arg-type]
    assert edited.moe_layer.submodules.mlp.func is ExchangingLayer
    attention = edited.attention_layer.submodules.self_attention.submodules
    assert attention.core_attention is TECoreAttention
    stock = hybrid.stock_stack_spec.submodules.attention_layer.submodules.self_attention.submodules
    assert stock.core_attention is TEDotProductAttention
    attention.core_attention = stock.core_attention
    assert edited.attention_layer == hybrid.stock_stack_spec.submodules.attention_layer


def test_missing_transformer_engine_is_said() -> None:
    with pytest.raises(RankError, match="CannotRun: --transformer-impl transformer_engine needs"):
        run_ranks(1, train, f"{PATTERN} --transformer-impl transformer_engine", None, NAME)


def test_other_layers_are_refused_by_name() -> None:
    with pytest.raises(RankError, match=r"Refused: without transformer-engine .* layers \* - E, got M"):
        run_ranks(1, train, "--hybrid-layer-pattern M-*- --num-layers 4", None, NAME)


def test_experts_of_a_pattern_must_be_counted() -> None:
    with pytest.raises(Refused, match="layer E needs --num-experts; give it, or take - in the place of E"):
        hybrid._local_submodules(SimpleNamespace(num_moe_experts=None), ["*", "E"])  # type: ignore[arg-type]
