"""Settings of a run: every flag of ours is one field, from the parser to the config that a layer reads."""

from argparse import ArgumentParser
from dataclasses import dataclass, fields
from types import SimpleNamespace

import pytest

from megatron_cp.megatron.arguments.command_line import wants_layers
from megatron_cp.megatron.arguments.context import add_arguments
from megatron_cp.megatron.flags.context import AttentionFlags
from megatron_cp.megatron.flags.experts import ExpertFlags
from megatron_cp.megatron.flags.flag import flag
from megatron_cp.megatron.flags.pipeline import PipelineFlags
from megatron_cp.megatron.flags.replicas import LocalSgdFlags
from megatron_cp.megatron.flags.tensor import TensorFlags
from megatron_cp.megatron.run import Settings, settings_of_run

WORDS = {
    "kernel": "reference",
    "placement": "context-first",
    "stripe": 4,
    "chunks": 2,
    "cluster": "a100-ib",
    "sink": -0.5,
    "softcap": 30.0,
    "alibi": True,
    "latent": True,
    "self_check": True,
    "keep_attention": True,
    "loss_chunks": 4,
    "document_layout": "blocks",
    "plan": "balanced",
    "tokens_per_rank": 4096,
}


def parsed(*words: str) -> SimpleNamespace:
    return add_arguments(ArgumentParser()).parse_args(words, SimpleNamespace())


def test_a_value_goes_from_the_command_line_over_the_config_to_the_layer() -> None:
    assert set(WORDS) == {each.name for each in fields(AttentionFlags)}
    words = [
        word
        for name, value in WORDS.items()
        for word in (f"--cp-{name.replace('_', '-')}", *([] if value is True else [str(value)]))
    ]
    settings, config = Settings.of(parsed(*words)), SimpleNamespace()
    assert settings.attention == AttentionFlags(**WORDS)
    settings.attention.copy_to(config)
    assert vars(config) == {f"cp_{name}": value for name, value in WORDS.items()}
    assert AttentionFlags.of(config) == settings.attention


def test_flags_of_linears_go_the_same_way() -> None:
    words = "--tp-comm-type 2d --tp-grid 2 4 --tp-engine collective --tp-gemm stream-k".split()
    settings, config = Settings.of(parsed(*words)), SimpleNamespace()
    assert settings.tensor == TensorFlags(comm_type="2d", grid=["2", "4"], engine="collective", gemm="stream-k")
    settings.tensor.copy_to(config)
    assert vars(config) == {
        "tp_comm_type": "2d",
        "tp_grid": ["2", "4"],
        "tp_engine": "collective",
        "tp_gemm": "stream-k",
    }
    assert TensorFlags.of(config) == settings.tensor


def test_flags_of_experts_go_the_same_way() -> None:
    words = "--moe-grouped-product loop --moe-comm-type two-hop --moe-ranks-per-node 4 --moe-pieces 2".split()
    words += "--moe-group-ranks 2 --moe-router switch --moe-group-tokens 64 --moe-layer-experts 2:16".split()
    words += "--moe-placement lina --moe-replica-slots 2 --moe-placement-interval 5".split()
    words += "--moe-copies-ahead 0 --moe-cluster a100-ib".split()
    words += "--moe-gather auto --moe-degrees 1,2 --moe-tuning steps".split()
    settings, config = Settings.of(parsed(*words)), SimpleNamespace()
    assert settings.experts == ExpertFlags(
        grouped_product="loop",
        comm_type="two-hop",
        ranks_per_node=4,
        group_ranks=2,
        pieces=2,
        router="switch",
        group_tokens=64,
        layer_experts="2:16",
        placement="lina",
        replica_slots=2,
        placement_interval=5,
        copies_ahead=0,
        cluster="a100-ib",
        gather="auto",
        degrees="1,2",
        tuning="steps",
    )
    settings.experts.copy_to(config)
    assert vars(config) == {
        "moe_grouped_product": "loop",
        "moe_comm_type": "two-hop",
        "moe_ranks_per_node": 4,
        "moe_group_ranks": 2,
        "moe_pieces": 2,
        "moe_router": "switch",
        "moe_group_tokens": 64,
        "moe_layer_experts": "2:16",
        "moe_placement": "lina",
        "moe_replica_slots": 2,
        "moe_placement_interval": 5,
        "moe_copies_ahead": 0,
        "moe_cluster": "a100-ib",
        "moe_gather": "auto",
        "moe_degrees": "1,2",
        "moe_tuning": "steps",
    }
    assert ExpertFlags.of(config) == settings.experts


def test_flags_of_islands_have_the_outer_optimizers_own_values_by_default() -> None:
    words = "--local-sgd-steps 4 --local-sgd-outer diloco --local-sgd-outer-lr 0.5".split()
    found = Settings.of(parsed(*words)).local_sgd
    assert found == LocalSgdFlags(steps="4", outer="diloco", outer_lr=0.5)
    assert (found.learning_rate, found.decay) == (0.5, 0.9)
    assert Settings.of(parsed()).local_sgd == LocalSgdFlags()


@pytest.mark.parametrize("name", [*AttentionFlags.names(), *TensorFlags.names(), *ExpertFlags.names()])
def test_each_flag_asks_for_our_layers(name: str) -> None:
    assert wants_layers([name, "1"], te=True)


def test_a_new_flag_is_one_field() -> None:
    @dataclass(frozen=True, kw_only=True)
    class More(AttentionFlags):
        prefix = "cp"
        sink_tokens: int = flag(0, lambda: "TOKENS", lambda: "Tokens that all see.", int)

    parser, config = ArgumentParser(), SimpleNamespace()
    More.add_to(parser)
    assert More.of(parser.parse_args(["--cp-sink-tokens", "3"])).sink_tokens == 3
    assert More.names()[-1] == "--cp-sink-tokens"
    More(sink_tokens=5).copy_to(config)
    assert config.cp_sink_tokens == 5


def test_a_parser_without_our_flags_leaves_configs_alone() -> None:
    settings = Settings.of(SimpleNamespace(spec=["megatron_cp.megatron.spec", "gpt_layer_spec"], seq_length=64))
    assert (settings.our_layers, settings.attention, settings.seq_length) == (True, None, 64)
    assert settings.pipeline == PipelineFlags()


def test_a_program_without_arguments_has_defaults() -> None:
    assert settings_of_run() == Settings()


@pytest.mark.parametrize(
    ("schedule", "placement", "on_v", "splits"),
    [
        (None, None, False, False),
        ("1f1b", None, False, False),
        ("zb-v", None, True, True),
        ("auto", "v", True, True),
        ("auto", None, False, True),
    ],
)
def test_what_a_schedule_needs_of_megatron(schedule: str | None, placement: str | None, on_v: bool, splits: bool):
    flags = PipelineFlags(schedule=schedule, placement=placement)
    assert (flags.on_v, flags.splits) == (on_v, splits)
