import json
from collections.abc import Callable

import pytest
from typer.testing import CliRunner

from megatron_cp import __version__
from megatron_cp.batches import ALGORITHMS
from megatron_cp.cli import app
from megatron_cp.cli.listing import KINDS
from megatron_cp.context import BACKENDS
from megatron_cp.experts import EXCHANGES, PLACEMENTS, PRODUCTS, ROUTERS
from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.kernels import KERNELS
from megatron_cp.pipeline import SCHEDULES
from megatron_cp.recipe import recipe as recipes
from megatron_cp.replicas import OUTERS, QUANTISATIONS
from megatron_cp.tensor import ENGINES, GEMMS
from megatron_cp.tensor import SCHEMES as TENSOR_SCHEMES


def run(*words: str) -> str:
    done = CliRunner().invoke(app, [*words])
    assert done.exit_code == 0, done.output
    return done.stdout


TAKEN: dict[str, Callable[[str], object]] = {
    "recipes": recipes.find,
    "models": lambda name: recipes.find(f"models/{name}"),
    "clusters": load_cluster,
    "backends": BACKENDS.get,
    "schedules": SCHEDULES.get,
    "schemes": TENSOR_SCHEMES.get,
    "engines": ENGINES.get,
    "products": GEMMS.get,
    "experts": PRODUCTS.get,
    "exchanges": EXCHANGES.get,
    "routers": ROUTERS.get,
    "placements": PLACEMENTS.get,
    "outer-optimizers": OUTERS.get,
    "quantisations": QUANTISATIONS.get,
    "batch-algorithms": ALGORITHMS.get,
    "kernels": KERNELS.get,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_name_is_taken_by_what_it_is_for(kind: str) -> None:
    found = json.loads(run("list", kind, "--json"))
    assert found
    for entry in found:
        TAKEN[kind](entry["name"])
        assert 5 < len(entry["what"]) < 250, entry
        assert entry["name"] in run("list", kind)


def test_another_kind_is_refused_with_the_nearest() -> None:
    error = CliRunner().invoke(app, ["list", "schedule"]).exception
    assert "did you mean 'schedules'?" in str(error)


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_versions(flag: str) -> None:
    assert run(flag).startswith(f"megatron-cp {__version__} (Python 3.")
    assert "torch 2." in run(flag)


@pytest.mark.parametrize("words", [[], ["train"], ["estimate"], ["bench", "context"], ["data", "build"]])
def test_help_has_a_short_form(words: list[str]) -> None:
    assert run(*words, "-h") == run(*words, "--help")
