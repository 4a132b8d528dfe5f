"""The real pretrain() gives the same losses and gradient norms however the sequence is cut and whatever else is sharded."""

import pytest

from megatron_cp.context import BACKENDS
from tests.megatron.pretraining import pretrain_losses, tiny
from tests.ranks import run_ranks
from tests.tolerances import GRAD_NORM_DIGITS, LOSS_DIGITS

GRID = {2: "2 1", 4: "2 2"}


def losses(world_size, *flags):
    return run_ranks(world_size, pretrain_losses, tiny(*flags))[0]


def context(backend, size):
    grid = f"--hierarchical-context-parallel-sizes {GRID[size]}" if BACKENDS.get(backend).needs_grid else ""
    return f"--context-parallel-size {size} --cp-comm-type {backend} {grid}"


def assert_equal_runs(found, expected):
    assert [step["iteration"] for step in found] == [1, 2, 3, 4]
    for step, other in zip(found, expected, strict=True):
        assert step["loss"] == pytest.approx(other["loss"], rel=10**-LOSS_DIGITS)
        assert step["grad_norm"] == pytest.approx(other["grad_norm"], rel=10**-GRAD_NORM_DIGITS)


@pytest.fixture(scope="module")
def alone():
    """Runs on one rank, by their flags, each made once."""
    runs = {}

    def run(*flags):
        if flags not in runs:
            runs[flags] = losses(1, *flags)
        return runs[flags]

    return run


def test_losses_fall(alone):
    run = alone()
    assert run[-1]["loss"] < run[0]["loss"]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("backend", BACKENDS.names)
def test_context_parallel_equals_one_rank(alone, backend, size):
    assert_equal_runs(losses(size, context(backend, size)), alone())
