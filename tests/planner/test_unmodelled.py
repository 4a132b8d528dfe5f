"""The estimate names the flags that it does not model, and takes what training takes."""

import json

import pytest
from typer.testing import CliRunner

from megatron_cp.cli import app

RECIPE = "llama3.1-8b-8k-h100x8"
PP2 = ("--pipeline-model-parallel-size", "2")


def estimated(*flags: str) -> dict:
    done = CliRunner().invoke(app, ["estimate", "--json", RECIPE, *flags])
    assert done.exit_code == 0, done.exception
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--recompute-method block --recompute-num-layers 1 --recompute-granularity full", "--recompute-method block"),
        ("--optimizer-cpu-offload", "--optimizer-cpu-offload"),
        ("--window-size 128,0", "--window-size 128,0"),
        ("--mtp-num-layers 1", "--mtp-num-layers 1"),
        ("--multi-latent-attention", "--multi-latent-attention"),
    ],
)
def test_a_flag_that_is_not_modelled_is_named(flags: str, named: str) -> None:
    assert estimated(*flags.split())["not_in_the_estimate"] == [named]
    done = CliRunner().invoke(app, ["estimate", RECIPE, *flags.split()])
    assert f"not in the estimate: {named}\n" in done.stdout


def test_a_recipe_without_such_a_flag_has_no_such_line() -> None:
    assert estimated()["not_in_the_estimate"] == []


def test_recompute_activations_is_the_selective_kind() -> None:
    assert estimated("--recompute-activations") == estimated("--recompute-granularity", "selective")


def test_the_schedule_alone_says_its_chunks_as_in_training() -> None:
    alone = estimated(*PP2, "--pp-schedule", "zb-v")
    assert alone == estimated(*PP2, "--pp-schedule", "zb-v", "--num-virtual-stages-per-pipeline-rank", "2")
