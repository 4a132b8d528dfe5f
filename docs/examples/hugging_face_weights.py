"""Weights of a LLaMA of transformers under the names of Megatron's GPTModel."""

from collections.abc import Mapping

import torch
from torch import Tensor

EQUAL = {
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
    "lm_head.weight": "output_layer.weight",
}
EQUAL_IN_A_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
    "post_attention_layernorm.weight": "pre_mlp_layernorm.weight",
    "mlp.down_proj.weight": "mlp.linear_fc2.weight",
}


def megatron_weights(weights: Mapping[str, Tensor], layers: int, groups: int) -> dict[str, Tensor]:
    """Return the weights of a LLaMA, with or without tied embeddings, for one tensor-parallel rank.

    layers: num_hidden_layers
    groups: num_key_value_heads, Megatron's --num-query-groups
    """
    found = {ours: weights[name] for name, ours in EQUAL.items() if name in weights}
    for number in range(layers):
        theirs, ours = f"model.layers.{number}.", f"decoder.layers.{number}."
        found |= {ours + name: weights[theirs + known] for known, name in EQUAL_IN_A_LAYER.items()}
        # each group's query heads, then its key head and its value head
        parts = [weights[f"{theirs}self_attn.{name}_proj.weight"].unflatten(0, (groups, -1)) for name in "qkv"]
        found[ours + "self_attention.linear_qkv.weight"] = torch.cat(parts, dim=1).flatten(0, 1)
        both = [weights[f"{theirs}mlp.{name}_proj.weight"] for name in ("gate", "up")]
        found[ours + "mlp.linear_fc1.weight"] = torch.cat(both)
    return found
