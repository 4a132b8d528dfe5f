"""Stack spec for HybridModel with context-parallel attention, with and without TransformerEngine.

`--spec megatron_cp.megatron.spec hybrid_stack_spec --hybrid-layer-pattern "*-*-"`; HybridModel takes an object, not a
function. A GPT layer is the pair `*-`, or `*E` with experts. Without TransformerEngine patterns of attention (`*`), MLP
(`-`) and expert (`E`) layers are built from local parts; with it Megatron's own stack is, its attention replaced.
"""

from dataclasses import replace
from typing import Any

from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec as stock_stack_spec
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from megatron_cp.errors import Refused
from megatron_cp.megatron.experts.dispatcher import connect_experts
from megatron_cp.megatron.experts.placement import link_copies
from megatron_cp.megatron.layers.chunks import free_mlp_chunks
from megatron_cp.megatron.layers.norm import Norm
from megatron_cp.megatron.layers.specs import (
    SpecProvider,
    check_unmodified_script,
    copy_settings,
    local_layer_spec,
    norm_keys,
    refuse_implementation,
    with_our_attention,
    with_our_experts,
)
from megatron_cp.megatron.layers.verify import verify_models
from megatron_cp.megatron.run import settings_of_run

LOCAL_SYMBOLS = "*-E"


class ContextParallelHybridStack(HybridStack):
    """Megatron's stack, with the layers that the config asks for and a final norm that needs no TransformerEngine.

    Raises ValueError for a local stack with other layers than attention, MLP and experts, and as `gpt_layer_spec` does.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridStackSubmodules,
        pre_process: bool = True,
        layer_type_list: list[str] | None = None,
        pp_layer_offset: int = 0,
        post_layer_norm: bool = True,
        **rest: Any,
    ) -> None:
        refuse_implementation(config)
        check_unmodified_script()
        # Megatron makes the stack from its config alone
        copy_settings(settings_of_run(), config)
        connect_experts(config)
        local = config.transformer_impl == "local"
        super().__init__(
            config=config,
            submodules=_local_submodules(config, layer_type_list or []) if local else _stock_submodules(config),
            pre_process=pre_process,
            layer_type_list=layer_type_list,
            pp_layer_offset=pp_layer_offset,
            # the stock final norm is TransformerEngine's
            post_layer_norm=post_layer_norm and not local,
            **rest,
        )
        self.post_layer_norm = post_layer_norm
        if local and self.post_process and post_layer_norm:
            self.final_norm = Norm(config, config.hidden_size, config.layernorm_epsilon)
        verify_models(link_copies(free_mlp_chunks([self])))


def _stock_submodules(config: TransformerConfig) -> HybridStackSubmodules:
    stock: Any = stock_stack_spec.submodules
    return replace(
        stock,
        attention_layer=with_our_attention(stock.attention_layer),
        mla_layer=with_our_attention(stock.mla_layer),
        moe_layer=with_our_experts(stock.moe_layer, config),
    )


def _local_submodules(config: TransformerConfig, symbols: list[str]) -> HybridStackSubmodules:
    foreign = sorted(set(symbols) - set(LOCAL_SYMBOLS))
    if foreign:
        raise Refused(
            f"without transformer-engine a hybrid pattern may have the layers {' '.join(LOCAL_SYMBOLS)}, "
            f"got {' '.join(foreign)}; install transformer-engine or change --hybrid-layer-pattern"
        )
    if "E" in symbols and config.num_moe_experts is None:
        raise Refused("a hybrid pattern with the layer E needs --num-experts; give it, or take - in the place of E")
    provider = SpecProvider(config)
    layer = local_layer_spec(config, provider, moe=False).submodules
    experts = local_layer_spec(config, provider, moe="E" in symbols).submodules
    return HybridStackSubmodules(
        attention_layer=ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=layer.input_layernorm,
                self_attention=layer.self_attention,
                self_attn_bda=layer.self_attn_bda,
                sharded_state_dict_keys_map=norm_keys("input_layernorm."),
            ),
        ),
        mlp_layer=ModuleSpec(
            module=MLPLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=layer.pre_mlp_layernorm,
                mlp=layer.mlp,
                mlp_bda=layer.mlp_bda,
                sharded_state_dict_keys_map=norm_keys("pre_mlp_layernorm."),
            ),
        ),
        # the norm before experts is a module of its own in checkpoints of the stock stack
        moe_layer=ModuleSpec(
            module=MoETransformerLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=experts.pre_mlp_layernorm, mlp=experts.mlp, mlp_bda=experts.mlp_bda
            ),
        ),
    )


hybrid_stack_spec = ModuleSpec(module=ContextParallelHybridStack, submodules=HybridStackSubmodules())
