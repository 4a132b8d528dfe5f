"""The estimator counts operations as Megatron does."""

from types import SimpleNamespace

import pytest

from megatron_cp.planner.model import Transformer

DENSE = Transformer(
    name="dense",
    layers=4,
    hidden=256,
    ffn=704,
    heads=8,
    kv_heads=2,
    head_dim=32,
    vocab=1024,
)
PLAIN = Transformer(
    name="plain", layers=3, hidden=128, ffn=512, heads=4, kv_heads=4, head_dim=32, vocab=512, gated=False
)
MIXTURE = Transformer(
    name="mixture",
    layers=4,
    hidden=256,
    ffn=704,
    heads=8,
    kv_heads=2,
    head_dim=32,
    vocab=1024,
    experts=8,
    top_k=2,
    expert_ffn=320,
    moe_every=2,
)


@pytest.mark.parametrize("model", [DENSE, PLAIN, MIXTURE], ids=lambda model: model.name)
def test_operations_are_megatrons(model):
    from megatron.training.training import num_floating_point_operations

    arguments = SimpleNamespace(
        num_layers=model.layers,
        hidden_size=model.hidden,
        ffn_hidden_size=model.ffn,
        num_attention_heads=model.heads,
        num_query_groups=model.kv_heads,
        group_query_attention=True,
        kv_channels=model.head_dim,
        padded_vocab_size=model.vocab,
        swiglu=model.gated,
        seq_length=512,
        num_experts=model.experts or None,
        moe_layer_freq=model.moe_every,
        moe_router_topk=model.top_k,
        moe_ffn_hidden_size=model.expert_ffn or None,
        moe_latent_size=None,
        moe_shared_expert_intermediate_size=None,
        multi_latent_attention=False,
        attention_output_gate=False,
        experimental_attention_variant=None,
        hybrid_layer_pattern=None,
        mtp_num_layers=None,
    )
    assert model.flops(512, 6) == pytest.approx(num_floating_point_operations(arguments, 6), rel=1e-12)
