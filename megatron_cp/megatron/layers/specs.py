"""Layer specs with context-parallel attention, for Megatron, Megatron-Bridge and slime."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from megatron.core.extensions.transformer_engine import HAVE_TE, TEDotProductAttention
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
    get_gpt_mtp_block_spec_for_backend,
    get_mlp_module_spec_for_backend,
)
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType, LayerType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import L2Norm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megatron_cp.errors import CannotRun, Refused
from megatron_cp.experts.pyramid import experts_of_layers
from megatron_cp.megatron.arguments.command_line import check_script
from megatron_cp.megatron.arguments.upstream_faults import refuse_upstream_faults
from megatron_cp.megatron.experts.choices import count_choices
from megatron_cp.megatron.experts.dispatcher import connect_experts, exchanging
from megatron_cp.megatron.experts.grouped_mlp import GroupedMLP
from megatron_cp.megatron.experts.linears import ExpertColumnLinear, ExpertRowLinear
from megatron_cp.megatron.experts.placement import link_copies, placing
from megatron_cp.megatron.experts.priority import put_exchanges_first
from megatron_cp.megatron.experts.pyramid import with_experts
from megatron_cp.megatron.experts.router import routing
from megatron_cp.megatron.experts.tuned import tuning
from megatron_cp.megatron.flags.context import AttentionFlags
from megatron_cp.megatron.flags.experts import ExpertFlags
from megatron_cp.megatron.flags.tensor import TensorFlags
from megatron_cp.megatron.hooks import HOOKS, is_on
from megatron_cp.megatron.layers.attention import CoreAttention
from megatron_cp.megatron.layers.chunks import free_mlp_chunks
from megatron_cp.megatron.layers.latent import LatentSelfAttention, UpProjection
from megatron_cp.megatron.layers.norm import Norm
from megatron_cp.megatron.layers.packed import hand_on_documents
from megatron_cp.megatron.layers.te_attention import TECoreAttention
from megatron_cp.megatron.layers.verify import verify_models
from megatron_cp.megatron.machine.environment import refuse_mixed_gpus
from megatron_cp.megatron.run import Settings, args_of_run, settings_of_run
from megatron_cp.megatron.tensor.cube import CubeMLP, CubeParallelLinear
from megatron_cp.megatron.tensor.groups import connect_linears
from megatron_cp.megatron.tensor.linears import GridColumnLinear, GridRowLinear, place_output_layers
from megatron_cp.tensor import CUBE

# Checkpoints name a layer's norms as TransformerEngine does, where they are part of the linears that follow.
NORM_KEYS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


class SpecProvider(LocalSpecProvider):
    """Megatron's local building blocks with our core attention, norm and, where asked for, linears and experts."""

    def __init__(self, config: TransformerConfig | None = None) -> None:
        self._linears = TensorFlags.of(config).ours

    def column_parallel_linear(self) -> type:
        """Return Megatron's linear, or ours over a grid of the tensor-parallel ranks."""
        stock: type = super().column_parallel_linear()
        return GridColumnLinear if self._linears else stock

    def row_parallel_linear(self) -> type[RowParallelLinear]:
        """Return Megatron's linear, or ours over a grid of the tensor-parallel ranks."""
        return GridRowLinear if self._linears else super().row_parallel_linear()

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:
        """Return Megatron's experts, which run one by one, or ours, which run together."""
        if not moe_use_grouped_gemm:
            return super().grouped_mlp_modules(moe_use_grouped_gemm)
        linears: Any = MLPSubmodules(linear_fc1=ExpertColumnLinear, linear_fc2=ExpertRowLinear)
        return partial(GroupedMLP, submodules=linears)

    def core_attention(self) -> type:
        """Return context-parallel attention."""
        return CoreAttention

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> type:
        """Return a norm that also works under sequence parallelism; the config says which one."""
        return Norm


def norm_keys(*norms: str) -> dict[str, str]:
    """Return the names that checkpoints have for these norms of a layer."""
    return {norm: NORM_KEYS[norm] for norm in norms}


def gpt_layer_spec(
    model: Any = None, config: TransformerConfig | None = None, vp_stage: int | None = None
) -> TransformerBlockSubmodules | ModuleSpec:
    """Return this pipeline stage's decoder layers with context-parallel attention, and the final norm.

    Called as `(GPTModelConfig, vp_stage=)` by Megatron 0.19, with a provider that is itself a TransformerConfig by
    Megatron-Bridge, as `(args, config, vp_stage)` by slime, and with nothing at all: then the global arguments are
    read. Where the model config takes hooks, the built model is verified and the banner is printed.

    Raises ValueError for what the spec cannot express, RuntimeError when transformer-engine is asked for and missing.
    """
    transformer = _transformer_config(model, config)
    _apply_settings(settings_of_run(), model, transformer)
    refuse_implementation(transformer)
    _refuse_stock_mtp(model, transformer)
    _attach_hooks(model)
    check_unmodified_script()
    _check_gpus(vp_stage)
    connect_linears(transformer)
    connect_experts(transformer)
    if transformer.transformer_impl == "transformer_engine":
        return with_our_experts(with_our_attention(_stock_spec(model, transformer, vp_stage)), transformer)
    return local_block_spec(transformer, SpecProvider(transformer), vp_stage)


def mtp_block_spec(
    config: Any, transformer_layer_spec: Any, vp_stage: int | None = None
) -> MultiTokenPredictionBlockSubmodules | None:
    """Return the multi-token-prediction block, its layers like the decoder's last one with our attention.

    Takes the place of Megatron's function of this name, which builds stock layers whatever the decoder's are.
    """
    transformer: TransformerConfig = config.transformer
    if transformer.mtp_num_layers is None:
        return None
    if transformer.transformer_impl == "transformer_engine":
        stock = get_gpt_decoder_layer_specs(transformer, True, transformer.normalization, transformer.qk_l2_norm)
        last = with_our_experts(with_our_attention(stock[-1]), transformer)
        return get_gpt_mtp_block_spec(transformer, last, use_transformer_engine=True, vp_stage=vp_stage)
    provider = SpecProvider(transformer)
    last = local_layer_specs(transformer, provider)[-1]
    return get_gpt_mtp_block_spec_for_backend(transformer, last, provider, vp_stage=vp_stage)


def mtp_layers(old: Callable[..., Any], settings: Settings, *args: Any, **kwargs: Any) -> Any:
    """Call `mtp_block_spec` where the arguments name a layer spec of ours, Megatron's function elsewhere."""
    return (mtp_block_spec if settings.our_layers else old)(*args, **kwargs)


def local_layer_spec(
    config: TransformerConfig, provider: BackendSpecProvider, moe: bool, experts: int | None = None
) -> ModuleSpec:
    """Return the spec of one decoder layer, dense or with experts, of the provider's parts.

    experts: of the layer, where the model has other layers with other numbers
    """
    norm = provider.layer_norm(rms_norm=config.normalization == "RMSNorm")
    # the norm of multi-latent attention is a module of its own in every checkpoint
    fused_norms = ["pre_mlp_layernorm."] if config.multi_latent_attention else NORM_KEYS
    mlp = _mlp(config, provider, moe)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=(_latent_attention if config.multi_latent_attention else _attention)(config, provider),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=mlp if not moe or experts in (None, config.num_moe_experts) else with_experts(mlp, experts),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=norm_keys(*fused_norms),
        ),
    )


def _attention(config: TransformerConfig, provider: BackendSpecProvider) -> ModuleSpec:
    norm = provider.layer_norm(rms_norm=config.normalization == "RMSNorm")
    qk_norm = L2Norm if config.qk_l2_norm else norm if config.qk_layernorm else IdentityOp
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=provider.column_parallel_linear(),
            core_attention=provider.core_attention(),
            linear_proj=provider.row_parallel_linear(),
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )


def _latent_attention(config: TransformerConfig, provider: BackendSpecProvider) -> ModuleSpec:
    """Return the spec of multi-latent attention, DeepSeek-AI 2024, arXiv:2405.04434, section 2.1."""
    latent_norm = provider.layer_norm(rms_norm=config.normalization == "RMSNorm") if config.qk_layernorm else IdentityOp
    column, travels = provider.column_parallel_linear(), AttentionFlags.of(config).latent
    return ModuleSpec(
        module=LatentSelfAttention if travels else MLASelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=column,
            linear_q_down_proj=column,
            linear_q_up_proj=column,
            linear_kv_down_proj=column,
            linear_kv_up_proj=UpProjection if travels else column,
            core_attention=provider.core_attention(),
            linear_proj=provider.row_parallel_linear(),
            q_layernorm=latent_norm,
            kv_layernorm=latent_norm,
        ),
    )


def _mlp(config: TransformerConfig, provider: BackendSpecProvider, moe: bool) -> Any:
    """Return the spec of an MLP, dense or with experts; a dense one may be on a cube of ranks."""
    if not moe and TensorFlags.of(config).comm_type == CUBE and config.tensor_model_parallel_size > 1:
        linears = MLPSubmodules(linear_fc1=CubeParallelLinear, linear_fc2=CubeParallelLinear)
        return partial(CubeMLP.as_mlp_submodule, submodules=linears)
    mlp = get_mlp_module_spec_for_backend(
        backend=provider,
        num_experts=config.num_moe_experts if moe else None,
        moe_grouped_gemm=config.moe_grouped_gemm and moe,
    )
    return placing(tuning(exchanging(routing(mlp, config), config), config), config)


def local_layer_specs(config: TransformerConfig, provider: BackendSpecProvider) -> list[ModuleSpec]:
    """Return the specs of all decoder layers of the model, in order."""
    kinds = list(zip(_moe_layers(config), _experts_of_layers(config), strict=True))
    specs = {kind: local_layer_spec(config, provider, *kind) for kind in set(kinds)}
    return [specs[kind] for kind in kinds]


def local_block_spec(
    config: TransformerConfig, provider: BackendSpecProvider, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Return the decoder layers of this pipeline stage, with a final norm of the provider."""
    layers = local_layer_specs(config, provider)
    if config.pipeline_model_parallel_layout is not None:
        ours = config.pipeline_model_parallel_layout.get_layer_id_list(layer_type=LayerType.decoder, vp_stage=vp_stage)
    else:
        first = get_transformer_layer_offset(config, vp_stage=vp_stage)
        ours = range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage))
    return TransformerBlockSubmodules(
        layer_specs=[layers[index] for index in ours],
        layer_norm=provider.layer_norm(rms_norm=config.normalization == "RMSNorm"),
    )


def with_our_attention[Spec: (TransformerBlockSubmodules, ModuleSpec)](spec: Spec) -> Spec:
    """Return a copy of a layer, or block of layers, with our core attention."""
    if isinstance(spec, TransformerBlockSubmodules):
        return replace(spec, layer_specs=[_layer_with_our_attention(layer) for layer in spec.layer_specs or ()])
    return _layer_with_our_attention(spec)


def with_our_experts[Spec: (TransformerBlockSubmodules, ModuleSpec)](spec: Spec, config: TransformerConfig) -> Spec:
    """Return a layer, or block of layers, whose experts have the router and exchange that the config asks for."""
    if isinstance(spec, TransformerBlockSubmodules):
        return replace(spec, layer_specs=[with_our_experts(layer, config) for layer in spec.layer_specs or ()])
    parts: Any = spec.submodules
    mlp = placing(tuning(exchanging(routing(parts.mlp, config), config), config), config)
    return replace(spec, submodules=replace(parts, mlp=mlp))


def _layer_with_our_attention(layer: ModuleSpec) -> ModuleSpec:
    parts: Any = layer.submodules
    attention = getattr(parts.self_attention, "submodules", None)
    if attention is None or not hasattr(attention, "core_attention"):
        raise Refused(
            f"the stock spec has a layer without core attention ({parts.self_attention}); "
            f"megatron-cp serves self-attention layers only"
        )
    core = TECoreAttention if attention.core_attention is TEDotProductAttention else CoreAttention
    ours = replace(parts.self_attention, submodules=replace(attention, core_attention=core))
    return replace(layer, submodules=replace(parts, self_attention=ours))


def _moe_layers(config: TransformerConfig) -> list[bool]:
    frequency = config.moe_layer_freq
    if config.num_moe_experts is None:
        return [False] * config.num_layers
    if isinstance(frequency, int):
        return [index % frequency == 0 for index in range(config.num_layers)]
    if len(frequency) != config.num_layers:
        raise Refused(f"moe_layer_freq needs {config.num_layers} entries, one per layer, got {len(frequency)}")
    return [bool(entry) for entry in frequency]


def _experts_of_layers(config: TransformerConfig) -> Sequence[int | None]:
    asked = ExpertFlags.of(config).layer_experts
    if asked is None or config.num_moe_experts is None:
        return [None] * config.num_layers
    return experts_of_layers(asked, config.num_moe_experts, config.num_layers)


def _transformer_config(model: Any, config: TransformerConfig | None) -> TransformerConfig:
    if config is not None:
        return config
    if isinstance(model, TransformerConfig):
        return model
    if isinstance(getattr(model, "transformer", None), TransformerConfig):
        return model.transformer
    if model is None:
        from megatron.training import get_args
        from megatron.training.arguments import core_transformer_config_from_args

        return core_transformer_config_from_args(get_args())
    raise TypeError(f"gpt_layer_spec takes a model config, a TransformerConfig or (args, config), got {type(model)}")


def copy_settings(settings: Settings, config: TransformerConfig) -> None:
    """Set on the config what the settings say to attention, linears and experts; all copies of the config have it."""
    for flags in (settings.attention, settings.tensor, settings.experts):
        if flags:
            flags.copy_to(config)
    # what `auto` chooses for; a program that parses no arguments lets it choose at the first call
    if settings.seq_length:
        config.cp_seq_length = settings.seq_length


def _apply_settings(settings: Settings, model: Any, config: TransformerConfig) -> None:
    copy_settings(settings, config)
    # Megatron parses --rope-scaling-factor and never hands it on: every model would get 8.
    if settings.rope_scaling_factor is not None and hasattr(model, "rope_scaling_factor"):
        model.rope_scaling_factor = settings.rope_scaling_factor


def refuse_implementation(config: TransformerConfig) -> None:
    """Raise ValueError or RuntimeError unless the config's transformer implementation can carry our attention here."""
    if config.transformer_impl == "transformer_engine":
        if not HAVE_TE:
            raise CannotRun(
                "--transformer-impl transformer_engine needs transformer-engine, which is not installed; "
                "install it or pass --transformer-impl local"
            )
        if AttentionFlags.of(config).latent:
            raise Refused(
                "--cp-latent expands latents by a plain weight, and transformer-engine norms them inside its "
                "up-projection; pass --transformer-impl local, or leave --cp-latent out"
            )
    elif config.transformer_impl != "local":
        raise Refused(
            f"megatron-cp's attention takes --transformer-impl local or transformer_engine, "
            f"got {config.transformer_impl!r}"
        )
    else:
        _refuse_on_local(config)


def _refuse_stock_mtp(model: Any, config: TransformerConfig) -> None:
    if config.mtp_num_layers and hasattr(model, "transformer") and not _mtp_is_ours():
        raise Refused(
            "multi-token prediction (--mtp-num-layers) is built outside --spec, with stock attention; "
            "start through megatron_cp.launch or megatron_cp.pretrain_gpt, or leave --mtp-num-layers out"
        )


def check_unmodified_script() -> None:
    # our launcher checks it itself, and the package's own entry has data and a loss of its own
    if is_on(HOOKS.get("checks")):
        return
    check_script(sys.argv[1:], layers=True)
    args = args_of_run()
    if args is not None:
        refuse_upstream_faults(args, HAVE_TE)
        _refuse_documents_between_ends(args)


def _refuse_documents_between_ends(args: Any) -> None:
    if not getattr(args, "dataloader_inter_document_masking", False) or is_on(HOOKS.get("document-stages")):
        return
    stages = args.pipeline_model_parallel_size * (args.virtual_pipeline_model_parallel_size or 1)
    if stages <= 2:
        return
    raise Refused(
        f"--dataloader-inter-document-masking on {stages} pipeline stages: a script of Megatron's builds no dataset on "
        "the stages between the first and the last, whose attention needs the ends of documents; start the script "
        "through megatron_cp.launch, or run megatron_cp.pretrain_gpt instead of it"
    )


def _check_gpus(vp_stage: int | None) -> None:
    # under our launcher and entry all processes build this model
    if is_on(HOOKS.get("checks")) and not vp_stage:
        refuse_mixed_gpus()


def _refuse_on_local(config: TransformerConfig) -> None:
    if config.multi_latent_attention and config.tensor_model_parallel_size > 1:
        # the backward pass of Megatron's gather keeps what the rank's own heads add to the shared rotary keys
        raise Refused(
            f"multi-latent attention between local linears loses other ranks' part of a gradient under tensor "
            f"parallelism, got --tensor-model-parallel-size {config.tensor_model_parallel_size}; use 1, or "
            f"--transformer-impl transformer_engine"
        )
    if config.multi_latent_attention and config.qk_layernorm and config.q_lora_rank is None:
        raise Refused(
            "the local spec of megatron-cp has no norm of queries without --q-lora-rank, which --qk-layernorm asks for "
            "with --multi-latent-attention; leave --qk-layernorm out, give --q-lora-rank, or use --transformer-impl "
            "transformer_engine"
        )
    for name in (
        "experimental_attention_variant",
        "use_kitchen",
        "heterogeneous_block_specs",
    ):
        if getattr(config, name, None):
            raise Refused(
                f"the local spec of megatron-cp does not do {name}, got {getattr(config, name)!r}; leave it out"
            )


def _mtp_is_ours() -> bool:
    return is_on(HOOKS.get("mtp-layers"))


def _attach_hooks(model: Any) -> None:
    # Megatron-Bridge keeps its list to itself and has a method for it
    hooks = getattr(model, "post_wrap_hooks", getattr(model, "_post_wrap_hooks", []))
    attached = (
        *(place_output_layers, free_mlp_chunks, put_exchanges_first, link_copies, count_choices),
        *(verify_models, hand_on_documents),
    )
    for hook in attached:
        # the spec is asked for once per virtual pipeline stage
        if hook in hooks:
            continue
        if hasattr(model, "register_post_wrap_hook"):
            model.register_post_wrap_hook(hook)
        elif isinstance(hooks, list):
            hooks.append(hook)


def _stock_spec(model: Any, config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules | ModuleSpec:
    if hasattr(model, "transformer"):
        from megatron.training.models.gpt import default_layer_spec

        return default_layer_spec(model, vp_stage)
    return get_gpt_decoder_block_spec(
        config, True, normalization=config.normalization, qk_l2_norm=config.qk_l2_norm, vp_stage=vp_stage
    )
