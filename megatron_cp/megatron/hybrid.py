"""A ready stack spec for HybridModel patterns of attention (`*`) and MLP (`-`) layers, without TransformerEngine.

`--spec megatron_cp.megatron.spec hybrid_stack_spec --hybrid-layer-pattern "*-*-"`; HybridModel takes an object, not a
function. A GPT layer is the pair `*-`.
"""

from typing import Any

from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_cp.megatron.layers import SpecProvider, copy_flags, local_layer_spec
from megatron_cp.megatron.norm import Norm
from megatron_cp.megatron.verify import verify_models

SYMBOLS = {"*": "attention", "-": "MLP"}


class LocalHybridStack(HybridStack):
    """Megatron's stack, with the layers that the config asks for and a final norm that needs no TransformerEngine.

    Raises ValueError for a pattern with other layers than attention and MLP.
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
        foreign = sorted(set(layer_type_list or ()) - set(SYMBOLS))
        if foreign:
            raise ValueError(
                f"hybrid_stack_spec of megatron-cp builds the layers {' '.join(SYMBOLS)} of a hybrid pattern, "
                f"got {' '.join(foreign)}; use Megatron's own stack, which needs transformer-engine"
            )
        copy_flags(config)
        super().__init__(
            config=config,
            submodules=_submodules(config),
            pre_process=pre_process,
            layer_type_list=layer_type_list,
            pp_layer_offset=pp_layer_offset,
            # the stock final norm is TransformerEngine's
            post_layer_norm=False,
            **rest,
        )
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.final_norm = Norm(config, config.hidden_size, config.layernorm_epsilon)
        verify_models([self])


def _submodules(config: TransformerConfig) -> HybridStackSubmodules:
    layer = local_layer_spec(config, SpecProvider(), moe=False).submodules
    return HybridStackSubmodules(
        attention_layer=ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=layer.input_layernorm,
                self_attention=layer.self_attention,
                self_attn_bda=layer.self_attn_bda,
                sharded_state_dict_keys_map={"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
            ),
        ),
        mlp_layer=ModuleSpec(
            module=MLPLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=layer.pre_mlp_layernorm,
                mlp=layer.mlp,
                mlp_bda=layer.mlp_bda,
                sharded_state_dict_keys_map={"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
            ),
        ),
    )


hybrid_stack_spec = ModuleSpec(module=LocalHybridStack, submodules=HybridStackSubmodules())
