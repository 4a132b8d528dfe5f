"""The bench of linears: engines in turns with equal results, and a refusal to print times of different ones."""

import pytest
from typer.testing import CliRunner

from megatron_cp.bench import linears
from megatron_cp.bench.linears import LinearBench, measure_linears
from megatron_cp.cli import app
from megatron_cp.tensor.place import GridSize


def test_each_engine_has_a_time_for_each_round():
    found = measure_linears(2, GridSize(2, 1), ("collective", "ring"), LinearBench(64, 32, 64, 3))
    assert [each.engine for each in found] == ["collective", "ring"]
    for each in found:
        assert len(each.seconds) == 3
        assert each.spread[0] <= each.median <= each.spread[1]
        assert each.spread[0] > 0


def wrong(*args):
    """Measure with a tolerance that no two engines keep."""
    linears.CLOSE = -1.0
    return _measured(*args)


_measured = linears._measure


def test_engines_that_differ_are_not_timed(monkeypatch):
    monkeypatch.setattr(linears, "_measure", wrong)
    with pytest.raises(RuntimeError, match="engine collective differs from collective"):
        measure_linears(2, GridSize(2, 1), ("collective", "ring"), LinearBench(64, 32, 64, 1))


def test_sizes_that_do_not_divide_are_refused():
    error = CliRunner().invoke(app, ["bench", "linears", "--ranks", "4", "--weights", "3"]).exception
    assert "must be a multiple of --weights" in str(error)
