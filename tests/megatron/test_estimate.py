"""The estimator counts operations as Megatron does, and knows every flag that Megatron has."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatron_cp.megatron.arguments.known_flags import parser
from megatron_cp.planner.flags import ASSUMED, FREE, MODELLED, UNMODELLED
from megatron_cp.planner.model import Latent, Transformer
from megatron_cp.planner.of_recipe import parallel_of
from megatron_cp.recipe import recipe

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


PREDICTS = replace(DENSE, name="multi-token", mtp=2)
LATENT = replace(PLAIN, name="latent", head_dim=40, kv_heads=4, latent=Latent(48, 24, 32, 16, 32))


@pytest.mark.parametrize("model", [DENSE, PLAIN, MIXTURE, PREDICTS, LATENT], ids=lambda model: model.name)
def test_operations_are_megatrons(model):
    from megatron.training.training import num_floating_point_operations

    arguments = SimpleNamespace(
        num_layers=model.layers,
        hidden_size=model.hidden,
        ffn_hidden_size=model.ffn,
        num_attention_heads=model.heads,
        num_query_groups=model.kv_heads,
        group_query_attention=model.latent is None,
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
        multi_latent_attention=model.latent is not None,
        attention_output_gate=False,
        experimental_attention_variant=None,
        hybrid_layer_pattern=None,
        mtp_num_layers=model.mtp or None,
        **(model.latent._asdict() if model.latent else {}),
    )
    assert model.flops(512, 6) == pytest.approx(
        num_floating_point_operations(arguments, 6), rel=NEAR.get(model.name, 1e-12)
    )


# of each layer of multi-token prediction Megatron counts the norms too
NEAR = {"multi-token": 1e-3}


def test_every_flag_of_megatron_is_modelled_named_or_without_effect():
    known = {option for action in parser()._actions for option in action.option_strings if option.startswith("--")}
    lists = {"modelled": MODELLED, "unmodelled": UNMODELLED, "free": FREE}
    assert known - frozenset().union(*lists.values()) == set(), "in none of the lists of planner/flags.py"
    for name, flags in lists.items():
        assert flags - known == set(), f"{name}, but no flag of this Megatron"
        assert [other for other in lists if other != name and flags & lists[other]] == [], name
    assert set(ASSUMED) <= UNMODELLED


@pytest.mark.parametrize("layout", ["Et*3|(tt|)*6,t|L", "E,(t|)*14tL", "Ett|t*6|(t|t)*3|tL", "E|(tttt|)*4L"])
def test_a_layout_is_read_as_megatron_reads_it(layout):
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    stages = PipelineParallelLayerLayout.parse_str_to_list(layout)
    counts = tuple(stage.count(LayerType.decoder) for stage in stages)
    flags = ["--pipeline-model-parallel-layout", layout, "--pipeline-model-parallel-size", str(len(stages))]
    run = recipe.load("models/llama3.1-8b", {}, [*flags, "--nproc-per-node", str(len(stages))])
    assert parallel_of(run, sum(counts)).layout == counts
