"""What the estimate makes of --tp-comm-type, --tp-grid and --tp-engine, and the schemes that a plan weighs."""

from dataclasses import replace

import pytest

from megatron_cp.context.trace.record import record
from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.planner.estimate import estimate
from megatron_cp.planner.model import model_of
from megatron_cp.planner.of_recipe import parallel_of
from megatron_cp.planner.plan_recipe import as_recipe
from megatron_cp.planner.plan_request import PlanRequest
from megatron_cp.planner.plans import label
from megatron_cp.planner.search import search
from megatron_cp.recipe import recipe
from megatron_cp.recipe.file import Unset
from megatron_cp.tensor.cost import LayerLinears, cheapest
from tests.cases import slow_unless


def estimated(*words, name="llama3.1-8b-8k-h100x8"):
    run = recipe.load(name, {"DATA_PATH": "corpus"}, words)
    model = model_of(run)
    return estimate(
        model, parallel_of(run, model.layers), load_cluster(run.cluster), run.number("--seq-length", 1), record
    )


TP = ("--tensor-model-parallel-size", "4", "--sequence-parallel", "--tp-comm-overlap=false")
OVERLAP = ("--tensor-model-parallel-size", "4", "--sequence-parallel", "--tp-comm-overlap")


@pytest.fixture(scope="module")
def stock():
    return estimated(*TP)


def test_the_default_is_megatrons_own(stock):
    assert estimated(*TP, "--tp-comm-type", "1d").parts == stock.parts


def test_a_ring_hides_collectives_for_slower_products(stock):
    found = estimated(*TP, "--tp-comm-type", "flux")
    assert found.parts.collectives < stock.parts.collectives
    assert found.parts.products > stock.parts.products
    assert found.traffic.inside.tensor == pytest.approx(stock.traffic.inside.tensor)
    assert found.worst_memory == stock.worst_memory


def test_a_grid_sends_weights_too_and_keeps_one_gathered(stock):
    found = estimated(*TP, "--tp-comm-type", "2d")
    assert found.traffic.inside.tensor != stock.traffic.inside.tensor
    assert found.worst_memory.buffers > stock.worst_memory.buffers
    assert found.worst_memory.weights == stock.worst_memory.weights
    assert estimated(*TP, "--tp-comm-type", "2d", "--tp-grid", "4", "1").parts.products == pytest.approx(
        estimated(*TP, "--tp-comm-type", "flux").parts.products
    )


def test_panels_hide_weights_and_keep_fewer_of_them():
    grid = (*TP, "--tp-comm-type", "2d", "--tp-grid", "1", "4")
    whole, panels = estimated(*grid), estimated(*grid, "--tp-engine", "panels")
    assert panels.parts.collectives < whole.parts.collectives
    assert panels.parts.products > whole.parts.products
    assert panels.worst_memory.buffers < whole.worst_memory.buffers
    assert panels.traffic.inside.tensor == whole.traffic.inside.tensor


def test_the_output_layer_hides_its_gather_behind_pieces():
    """One stage's time beside its layers; the exposed gather of T tokens becomes three pieces of it."""
    few = ("--num-layers", "1")
    collective, ring = (
        estimated(*TP, *few, "--tp-comm-type", "flux", "--tp-engine", one) for one in ("collective", "ring")
    )
    assert ring.parts.collectives < 0.5 * collective.parts.collectives


def test_auto_is_no_slower_than_any_scheme(stock):
    chosen = estimated(*TP, "--tp-comm-type", "auto")
    assert chosen.parallel.tp_scheme in ("1d", "flux", "2d")
    assert chosen.seconds <= stock.seconds
    assert chosen.seconds <= estimated(*TP, "--tp-comm-type", "2d").seconds


@pytest.mark.parametrize("scheme", ["1d", "flux", "2d", "2.5d", "3d", "auto"])
def test_every_scheme_has_an_estimate(scheme):
    found = estimated(*TP, "--tensor-model-parallel-size", "8", "--tp-comm-type", scheme)
    assert found.seconds > 0
    assert found.parallel.tp_scheme == scheme or scheme == "auto"


def test_the_overlap_of_transformer_engine_hides_collectives_of_its_linears_alone(stock):
    found = estimated(*OVERLAP)
    assert found.parts.collectives < stock.parts.collectives
    assert found.parts.products == stock.parts.products
    # these linears stay under auto, as in a run
    assert estimated(*OVERLAP, "--tp-comm-type", "auto").parts == found.parts
    assert estimated(*OVERLAP, "--tp-comm-type", "2d").parts == estimated(*TP, "--tp-comm-type", "2d").parts


def test_flux_stands_in_for_the_overlap_beside_megatrons_linears():
    local, flux = estimated(*OVERLAP, "--transformer-impl", "local"), estimated(*TP, "--tp-comm-type", "flux")
    assert (local.parallel.tp_scheme, local.parts) == ("flux", flux.parts)


REQUEST = PlanRequest(
    model=model_of(recipe.load("models/llama3.1-70b", Unset({}))),
    seq=2**17,
    gpus=64,
    cluster=load_cluster("h100-ib"),
    global_batch=8,
    backends=("zigzag",),
    schedules=("1f1b",),
)


@pytest.mark.parametrize("asked", slow_unless(["1d flux"], ["1d flux", "1d 2.5d"]))
def test_a_plan_weighs_the_schemes_that_are_asked_for(tmp_path, asked):
    asked = tuple(asked.split())
    alone, found = search(REQUEST, record, 3), search(replace(REQUEST, tensor=asked), record, 3)
    assert {one.parallel.tp_scheme for one in found.options} <= set(asked)
    assert found.best.seconds <= alone.best.seconds
    assert (found.examined, alone.tensor_why) == (alone.examined, "")
    assert found.tensor_why.startswith("of tensor-parallel schemes ")
    if "flux" in asked:
        assert label(found.best.parallel).startswith("TP=8 (flux) ")
    for one in found.options:
        file = tmp_path / "planned.yaml"
        file.write_text(as_recipe(one, "models/llama3.1-70b"))
        read = recipe.load(str(file), {"DATA_PATH": "corpus"})
        assert parallel_of(read, 80) == one.parallel
        assert (one.parallel.tp_scheme == "1d") == (read.flag("--transformer-impl", "") == "")


def test_a_cube_is_weighed_where_weights_divide_alone():
    wide, cluster = LayerLinears(2**17, 4096, 6144, 4096, 28672, 14336), load_cluster("h100-ib")

    def weighed(layer):
        return cheapest(layer, 8, cluster, "bfloat16", split=False, among=("1d", "3d")).why

    assert weighed(wide).startswith("3d takes ")
    for other in (wide._replace(first=2 * 14330, second=14330), wide._replace(first=0, second=0)):
        assert "3d" not in weighed(other)
