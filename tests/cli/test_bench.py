import json

import pytest
from typer.testing import CliRunner

from megatron_cp.bench import context as bench_context
from megatron_cp.bench.contest import LARGEST_ERROR, Row, Shape
from megatron_cp.bench.context import QUIET, Contenders, Report, bench
from megatron_cp.cli import app
from megatron_cp.context import BACKENDS

KEYS = {"backend", "ranks", "seq", "forward", "backward", "share_of_ideal", "sent", "peak", "max_error", "note"}


def run(*words):
    return CliRunner().invoke(app, ["bench", "context", *words])


def test_every_backend_is_timed_and_checked():
    result = run("--seq", "256", "--rounds", "1", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout[result.stdout.index("[") :])
    assert [row["backend"] for row in rows] == BACKENDS.names
    for row in rows:
        assert set(row) == KEYS
        assert row["max_error"] < 1e-5
        assert min(row["forward"], row["backward"], row["sent"], row["peak"]) > 0


def test_traffic_is_the_formulas_bytes():
    rows = {
        row.backend: row
        for row in bench(Contenders(("zigzag", "ulysses")), 2, [Shape(256, heads=2, kv_heads=2)], 1).rows
    }
    unit = 128 * 2 * 64 * 4
    # the later rank sends its K and V in each pass, and the gradients of the half of the other's that it saw
    assert rows["zigzag"].sent == 5 * unit
    assert rows["ulysses"].sent == 8 * unit // 2


def test_a_wrong_backend_gets_no_figures(monkeypatch):
    monkeypatch.setitem(LARGEST_ERROR, __import__("torch").float32, -1.0)
    monkeypatch.setattr(bench_context.mp, "spawn", _in_this_process)
    with pytest.raises(RuntimeError, match="no figure of this run can be trusted"):
        bench(Contenders(("zigzag",)), 1, [Shape(64)], 1)


def _in_this_process(function, args, nprocs):
    assert nprocs == 1
    function(0, *args)


def test_competing_load_is_said_instead_of_a_verdict(monkeypatch):
    row = Row("zigzag", 2, 64, 0.1, 0.2, 0.5, 1, 1, 1e-7)
    monkeypatch.setattr(bench_context, "bench", lambda *args, **kwargs: Report([row], "torch", "", core_share=0.6))
    loud = run("--seq", "64").stdout
    assert "No verdict: a rank got only 60% of its core" in loud
    assert "0.500" not in loud
    monkeypatch.setattr(bench_context, "bench", lambda *args, **kwargs: Report([row], "torch", "", core_share=0.99))
    assert "0.500" in run("--seq", "64").stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--backend", "zigzig"], "did you mean 'zigzag'"),
        (["--dtype", "float31"], "did you mean 'float32'"),
        (["--seq", "30", "--ranks", "4"], "needs S divisible by 2 * context_parallel_size = 8, got S = 30; pad to 32"),
    ],
)
def test_bad_input_is_refused(words, message):
    result = run(*words)
    assert result.exit_code != 0
    assert message in str(result.exception)


def test_quiet_threshold_is_near_a_whole_core():
    assert 0.9 < QUIET < 1
