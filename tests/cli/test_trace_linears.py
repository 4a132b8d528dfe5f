"""`megatron-cp trace --tp-comm-type` proves, counts and draws the linears of a layer."""

import json

import pytest
from typer.testing import CliRunner

from megatron_cp.cli import app
from megatron_cp.planner import linear_trace
from tests.cases import slow_unless

SMALL = ("--ranks", "4", "--seq", "256", "--heads", "8", "--kv-heads", "4", "--head-dim", "16", "--ffn", "192")
# bytes of bf16
STORED = 2


def run(*words):
    return CliRunner().invoke(app, ["trace", *SMALL, *words])


@pytest.mark.parametrize(
    ("words", "grid"),
    [
        (("1d",), [4, 1]),
        (("flux",), [4, 1]),
        (("2d",), [2, 2]),
        (("2d", "--tp-grid", "1 4"), [1, 4]),
        (("2d", "--tp-engine", "collective"), [2, 2]),
        (("2d", "--tp-engine", "panels"), [2, 2]),
        (("2d", "--tp-grid", "1 4", "--tp-engine", "panels"), [1, 4]),
    ],
)
def test_bytes_are_the_formulas_and_the_linears_are_exact(words, grid):
    found = json.loads(run("--json", "--tp-comm-type", *words).stdout)
    assert found["grid"] == grid
    assert found["error"] < 1e-12
    assert found["forward"]["time"] > 0
    sent = [a + b for a, b in zip(found["forward"]["sent"], found["backward"]["sent"], strict=True)]
    assert sent == [STORED * found["formula_elements"]] * 4


def test_auto_says_why_in_one_line():
    assert run("--tp-comm-type", "auto").stdout.startswith("auto: ")
    assert json.loads(run("--tp-comm-type", "2d", "--tp-grid", "auto", "--json").stdout)["scheme"] == "2d"


def test_the_table_and_the_pictures(tmp_path):
    done = run("--tp-comm-type", "2d", "--plot", str(tmp_path / "a.png"), "--plot", str(tmp_path / "a.json"))
    assert "proved: largest relative error" in done.stdout
    assert "2d on 2 x 2, engine ring, backward" in done.stdout
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "a.json").read_text())["traceEvents"]


def test_a_wrong_exchange_is_not_exact(monkeypatch):
    right = linear_trace.heads_for_tokens
    monkeypatch.setattr(linear_trace, "heads_for_tokens", lambda *args: right(*args).roll(1, 0))
    done = run("--tp-comm-type", "2d")
    assert done.exit_code == 1
    assert "NOT EXACT" in done.stdout


@pytest.mark.parametrize("engine", slow_unless(["ring"], ["collective", "ring"]))
def test_an_mlp_on_a_cube_is_traced_and_proved(engine):
    words = ("--ranks", "8", "--tp-comm-type", "3d", "--tp-engine", engine)
    found = json.loads(run(*words, "--json").stdout)
    assert (found["grid"], found["error"] < 1e-12) == ([2, 2, 2], True)
    sent = [a + b for a, b in zip(found["forward"]["sent"], found["backward"]["sent"], strict=True)]
    assert sent == [STORED * found["formula_elements"]] * 8


@pytest.mark.slow
def test_a_wrong_exchange_beside_a_cube_is_not_exact(monkeypatch):
    right = linear_trace.features_over
    monkeypatch.setattr(linear_trace, "features_over", lambda *args: right(*args).roll(1, 0))
    assert run("--ranks", "8", "--tp-comm-type", "3d").exit_code == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "trace takes one of --backend and --tp-comm-type, got neither"),
        (("--backend", "ring", "--tp-comm-type", "2d"), "got both"),
        (("--tp-comm-type", "2d", "--tp-grid", "2 4"), "product is --tensor-model-parallel-size 4, got 2 4"),
        (("--tp-comm-type", "flux", "--ffn", "190"), "--ffn must be divisible by --ranks 4, got 190"),
        (("--tp-comm-type", "3d"), "3d needs a --tensor-model-parallel-size of 8, 27 or 64, got 4"),
        (("--tp-comm-type", "flux", "--tp-engine", "panels"), "panels takes weights of a grid apart, got"),
        (("--tp-comm-type", "flux", "--tp-engine", "symmetric"), "engine symmetric runs over a process group"),
    ],
)
def test_what_cannot_be_traced_is_refused(words, message):
    assert message in str(run(*words).exception)
