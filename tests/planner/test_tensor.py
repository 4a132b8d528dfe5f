"""What the estimate makes of --tp-comm-type, --tp-grid and --tp-engine."""

import pytest

from megatron_cp.context.trace.record import record
from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.planner.estimate import estimate
from megatron_cp.planner.model import model_of
from megatron_cp.planner.parallel import parallel_of
from megatron_cp.recipe import recipe


def estimated(*words, name="llama3.1-8b-8k-h100x8"):
    run = recipe.load(name, {"DATA_PATH": "corpus"}, words)
    model = model_of(run)
    return estimate(
        model, parallel_of(run, model.layers), load_cluster(run.cluster), run.number("--seq-length", 1), record
    )


TP = ("--tensor-model-parallel-size", "4", "--sequence-parallel")


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


def test_auto_is_no_slower_than_any_scheme(stock):
    chosen = estimated(*TP, "--tp-comm-type", "auto")
    assert chosen.parallel.tp_scheme in ("1d", "flux", "2d")
    assert chosen.seconds <= stock.seconds
    assert chosen.seconds <= estimated(*TP, "--tp-comm-type", "2d").seconds
