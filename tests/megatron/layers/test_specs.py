"""Our layer specs: every way of asking for one, and what trains through `--spec` alone."""

import sys
from collections.abc import Callable
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import import_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import global_vars

from megatron_cp.megatron.experts.choices import count_choices
from megatron_cp.megatron.experts.placement import link_copies
from megatron_cp.megatron.experts.priority import put_exchanges_first
from megatron_cp.megatron.layers import specs
from megatron_cp.megatron.layers.attention import CoreAttention
from megatron_cp.megatron.layers.chunks import free_mlp_chunks
from megatron_cp.megatron.layers.hybrid import ContextParallelHybridStack
from megatron_cp.megatron.layers.norm import Norm
from megatron_cp.megatron.layers.packed import hand_on_documents
from megatron_cp.megatron.layers.verify import verify_models
from megatron_cp.megatron.spec import gpt_layer_spec
from megatron_cp.megatron.tensor.linears import place_output_layers
from tests.megatron.spec_run import grad_norms, losses, train
from tests.ranks import RankError, run_ranks, run_ranks_with_log

pytestmark = pytest.mark.filterwarnings("ignore:full scope is deprecated:UserWarning")

LOSS, GRAD_NORM = 1e-6, 1e-3
"""What print precision allows: seven digits of the loss, four of the gradient norm."""

POST_WRAP = [
    *(place_output_layers, free_mlp_chunks, put_exchanges_first, link_copies, count_choices),
    *(verify_models, hand_on_documents),
]
"""Our hooks on wrapped models, in their order."""


def config(**changes: Any) -> TransformerConfig:
    return TransformerConfig(**{"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, **changes})


def assert_ours(spec: Any, layer_count: int) -> None:
    assert isinstance(spec, TransformerBlockSubmodules)
    assert spec.layer_norm is Norm
    assert len(spec.layer_specs) == layer_count
    for layer in spec.layer_specs:
        assert layer.submodules.self_attention.submodules.core_attention is CoreAttention


class BridgeProvider(TransformerConfig):
    """Megatron-Bridge's providers are configs themselves and take hooks through a method."""

    def register_post_wrap_hook(self, hook: Any) -> None:
        self._post_wrap_hooks = [*getattr(self, "_post_wrap_hooks", []), hook]


def _conventions() -> None:
    from megatron.training.models.gpt import GPTModelConfig

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    local = config(transformer_impl="local")
    model = GPTModelConfig(transformer=local, vocab_size=64)
    for asked in (
        gpt_layer_spec(model),
        gpt_layer_spec(model, vp_stage=None),
        gpt_layer_spec(local, vp_stage=None),
        gpt_layer_spec(object(), local, None),
    ):
        assert_ours(asked, 4)
    # asked twice, as for two virtual stages, and still hooked once
    assert model.post_wrap_hooks == POST_WRAP
    provider = BridgeProvider(num_layers=4, hidden_size=32, num_attention_heads=4, transformer_impl="local")
    for _ in range(2):
        assert_ours(gpt_layer_spec(provider, vp_stage=None), 4)
    assert provider._post_wrap_hooks == POST_WRAP


def test_every_calling_convention_gives_our_layers() -> None:
    run_ranks(1, _conventions)


def _asked_with_global_args(models: list[Any]) -> None:
    assert_ours(gpt_layer_spec(), 2)


def test_without_arguments_the_global_ones_are_read() -> None:
    run_ranks(1, train, "--train-iters 1", _asked_with_global_args)


def _slices() -> list[list[bool]]:
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    model = config(
        transformer_impl="local",
        num_moe_experts=4,
        moe_layer_freq=[1, 0, 0, 1],
        add_bias_linear=False,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        pipeline_dtype=torch.float32,
    )
    stages = [gpt_layer_spec(model, vp_stage=stage) for stage in (0, 1)]
    return [[_is_moe(layer) for layer in stage.layer_specs] for stage in stages]  # type: ignore[union-attr]


def _is_moe(layer: Any) -> bool:
    mlp = layer.submodules.mlp
    return isinstance(mlp, partial) and mlp.func is MoELayer


def test_virtual_stages_get_their_own_layers_in_interleaved_order() -> None:
    # layers 1, 3 on the first stage, 2, 4 on the second; experts in 1 and 4
    assert run_ranks(2, _slices) == [[[True], [False]], [[False], [True]]]


def test_layers_from_some_number_on_have_more_experts_where_asked_for() -> None:
    model = config(transformer_impl="local", num_moe_experts=4, moe_ffn_hidden_size=64, add_bias_linear=False)
    model.moe_layer_experts = "3:8"  # type: ignore[attr-defined]
    mlps: list[Any] = [layer.submodules.mlp for layer in specs.local_layer_specs(model, specs.SpecProvider(model))]
    assert [mlp.func is MoELayer for mlp in mlps[:2]] == [True, True]
    assert {mlp.args for mlp in mlps[2:]} == {(mlps[2].args[0], 8)}


@pytest.mark.parametrize(("asked", "expected"), [(True, Norm), (False, IdentityOp)])
def test_query_key_norm_is_ours_when_asked_for(asked: bool, expected: type) -> None:
    spec = specs.local_layer_spec(config(qk_layernorm=asked), specs.SpecProvider(), moe=False)
    attention = spec.submodules.self_attention.submodules
    assert attention.q_layernorm is attention.k_layernorm is expected


def test_stock_spec_is_edited_in_its_attention_only() -> None:
    stock = get_gpt_layer_local_spec()
    edited = specs.with_our_attention(TransformerBlockSubmodules(layer_specs=[stock] * 2)).layer_specs[1]
    attention = edited.submodules.self_attention.submodules
    assert attention.core_attention is CoreAttention
    assert stock.submodules.self_attention.submodules.core_attention is DotProductAttention
    attention.core_attention = DotProductAttention
    assert edited == stock


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"transformer_impl": "transformer_engine"}, RuntimeError, "transformer-engine, which is not installed"),
        ({"transformer_impl": "inference_optimized"}, ValueError, "local or transformer_engine, got 'inference"),
        (
            {"multi_latent_attention": True, "tensor_model_parallel_size": 2},
            ValueError,
            "loses other ranks' part of a gradient .* got --tensor-model-parallel-size 2; use 1",
        ),
        (
            {"multi_latent_attention": True, "qk_layernorm": True, "q_lora_rank": None},
            ValueError,
            "no norm of queries without --q-lora-rank, which --qk-layernorm asks for",
        ),
        ({"experimental_attention_variant": "dsa"}, ValueError, "does not do experimental_attention_variant"),
        ({"use_kitchen": True}, ValueError, "does not do use_kitchen"),
    ],
)
def test_refuses_by_name(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    model = config(transformer_impl="local")
    for name, value in changes.items():
        setattr(model, name, value)
    with pytest.raises(error, match=words):
        gpt_layer_spec(model)


@pytest.mark.parametrize(
    "build",
    [gpt_layer_spec, lambda model: ContextParallelHybridStack(model, HybridStackSubmodules())],
    ids=["gpt", "hybrid"],
)
def test_silent_faults_of_megatron_are_refused_by_a_spec_alone(
    build: Callable[[TransformerConfig], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = SimpleNamespace(use_megatron_fsdp=True, num_distributed_optimizer_instances=2, overlap_grad_reduce=False)
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", args)
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py"])
    with pytest.raises(ValueError, match="reduces no gradients between the instances"):
        build(config(transformer_impl="local"))
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", "--sft", "--context-parallel-size", "2"])
    with pytest.raises(ValueError, match="--sft with --context-parallel-size 2: a script of Megatron's cuts each doc"):
        build(config(transformer_impl="local"))


def test_refuses_what_is_no_config() -> None:
    with pytest.raises(TypeError, match="takes a model config"):
        gpt_layer_spec("--spec")


def _imported_with_a_missing_package() -> str:
    for name in [name for name in sys.modules if name.startswith("megatron_cp.megatron")]:
        del sys.modules[name]
    sys.modules["megatron_cp.context.attend"] = None  # type: ignore[assignment]
    try:
        return f"got {import_module(('megatron_cp.megatron.spec', 'gpt_layer_spec'))}"  # type: ignore[arg-type]
    except RuntimeError as error:
        return str(error)


def test_megatron_cannot_swallow_a_failed_import() -> None:
    assert (
        "cannot be loaded: import of megatron_cp.context.attend halted"
        in run_ranks(1, _imported_with_a_missing_package)[0]
    )


@cache
def trained(world_size: int, flags: str, name: str = "gpt_layer_spec", hooked: tuple[str, ...] = ()) -> str:
    return run_ranks_with_log(world_size, train, flags, None, name, hooked)[1]


def assert_same_training(world_size: int, flags: str, whole: str, name: str = "gpt_layer_spec") -> str:
    """`flags` on several ranks and `whole` on one print the same losses and gradient norms; the log of the former."""
    log, expected = trained(world_size, flags, name), trained(1, whole, name)
    assert len(losses(expected)) == 4
    assert losses(log) == pytest.approx(losses(expected), rel=LOSS)
    assert grad_norms(log) == pytest.approx(grad_norms(expected), rel=GRAD_NORM)
    return log


# plain gradient descent: a wrong scale of a gradient shows, and rounding of one near zero is not blown up to a step
SGD = "--optimizer sgd --lr 0.3"
DENSE = f"--qk-layernorm {SGD}"
EXPERTS = f"{SGD} --num-experts 4 --moe-layer-freq [0,1] --moe-router-topk 2"


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("world_size", "flags", "said"),
    [
        pytest.param(2, "--tensor-model-parallel-size 2 --sequence-parallel", "CP=1", marks=pytest.mark.slow),
        pytest.param(2, "--pipeline-model-parallel-size 2", "layer 1: zigzag", marks=pytest.mark.slow),
        pytest.param(
            2,
            "--context-parallel-size 2 --recompute-granularity selective --recompute-modules core_attn",
            "layers 1-2: zigzag",
            marks=pytest.mark.slow,
        ),
        (
            4,
            "--context-parallel-size 4 --cp-comm-type a2a usp --hierarchical-context-parallel-sizes 2 2",
            "CP=4 = 2 inner * 2 outer",
        ),
    ],
)
def test_dense_model_trains_as_on_one_rank(world_size: int, flags: str, said: str) -> None:
    log = assert_same_training(world_size, f"{DENSE} {flags}", DENSE)
    banner = [line for line in log.splitlines() if line.startswith("[megatron-cp] layer")]
    assert said in banner[-1]
    if "a2a usp" in flags:
        assert banner.pop(0).startswith("[megatron-cp] layer 1: ulysses")
    assert len(banner) == 1


def test_model_with_experts_trains_as_on_one_rank() -> None:
    assert_same_training(2, f"{EXPERTS} --context-parallel-size 2", EXPERTS)


def test_multi_token_prediction_has_our_attention_with_the_hook() -> None:
    flags = "--mtp-num-layers 1"
    log, whole = (trained(size, f"{flags} --context-parallel-size {size}", hooked=("mtp-layers",)) for size in (2, 1))
    assert "[megatron-cp] MTP layer 1: zigzag" in log
    # Megatron averages this loss over each rank's own tokens, and one of 32 is masked, so that later steps may differ
    assert losses(log)[0] == pytest.approx(losses(whole)[0], rel=LOSS)
    assert losses(log) == pytest.approx(losses(whole), rel=1e-4)


def test_multi_token_prediction_is_refused_without_the_hook() -> None:
    with pytest.raises(RankError, match=r"Refused: multi-token prediction \(--mtp-num-layers\)"):
        run_ranks(1, train, "--mtp-num-layers 1")


def _train_with_stock_mtp() -> None:
    specs._mtp_is_ours = lambda: True
    train("--mtp-num-layers 1")


def test_a_layer_with_stock_attention_is_fatal() -> None:
    with pytest.raises(RankError, match=r"mtp\.layers\.0\.\S+core_attention \(DotProductAttention\)"):
        run_ranks(1, _train_with_stock_mtp)


def _inverse_frequencies(models: list[Any]) -> list[float]:
    return [float(value) for value in models[0].module.rotary_pos_emb.inv_freq]


def _expected_frequencies(factor: float) -> list[float]:
    rotary = RotaryEmbedding(8, 1.0, rope_scaling=True, rope_scaling_factor=factor, use_cpu_initialization=True)
    return [float(value) for value in rotary.inv_freq]


def test_rope_scaling_factor_reaches_the_model() -> None:
    flags = "--train-iters 1 --use-rope-scaling --rope-scaling-factor 32"
    (built,) = run_ranks(1, train, flags, _inverse_frequencies)
    assert built == _expected_frequencies(32.0)
    assert built != _expected_frequencies(8.0)


def _described(models: list[Any]) -> str:
    return models[0].module.decoder.layers[0].self_attention.core_attention.describe("cpu")


def test_kernel_flag_reaches_the_attention() -> None:
    flags = "--train-iters 1 --cp-kernel reference"
    (text,) = run_ranks(1, train, flags, _described, "gpt_layer_spec", ("flags",))
    assert "kernel reference" in text


def test_latents_between_linears_of_transformer_engine_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specs, "HAVE_TE", True)
    model = config(transformer_impl="transformer_engine")
    model.cp_latent = True  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="norms them inside its up-projection; pass --transformer-impl local"):
        specs.refuse_implementation(model)
