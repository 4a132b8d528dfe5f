"""The bench of linears: engines in turns with equal results, and a refusal to print times of different ones."""

import json

import pytest
import torch
from typer.testing import CliRunner

from megatron_cp.bench import linears
from megatron_cp.bench.comparison import WrongResultError
from megatron_cp.bench.linears import LinearBench, measure
from megatron_cp.cli import app
from megatron_cp.comm import in_process
from megatron_cp.tensor.place import GridSize


def measured():
    sizes = LinearBench(64, 32, 64, 3)
    return in_process(
        2, lambda fabric: measure(fabric, torch.device("cpu"), GridSize(1, 2), ("collective", "ring", "panels"), sizes)
    )


def test_each_engine_has_a_time_for_each_round():
    for found in measured():
        assert [each.engine for each in found] == ["collective", "ring", "panels"]
        assert found[0].over(found[0]) == [1, 1, 1]
        for each in found:
            assert len(each.seconds) == len(each.computing) == 3
            assert each.spread[0] <= each.median <= each.spread[1]
            assert each.spread[0] > 0


def test_engines_that_differ_are_not_timed(monkeypatch):
    monkeypatch.setattr(linears, "CLOSE", -1.0)
    with pytest.raises(WrongResultError, match="engine collective differs from collective"):
        measured()


@pytest.mark.slow
def test_the_command_prints_the_ratio_of_the_medians_with_its_spread():
    words = "bench linears --seq 64 --hidden 32 --rounds 3"
    found = json.loads(CliRunner().invoke(app, [*words.split(), "--json"]).stdout)
    assert [each["engine"] for each in found] == ["collective", "ring"]
    for each in found:
        assert each["of_collective"] == each["median"] / found[0]["median"]
        assert len(each["of_collective_in_rounds"]) == 3


def test_sizes_that_do_not_divide_are_refused():
    error = CliRunner().invoke(app, ["bench", "linears", "--ranks", "4", "--weights", "3"]).exception
    assert "must be a multiple of --weights" in str(error)
