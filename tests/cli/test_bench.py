import inspect
import json
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from megatron_cp.bench import comparison, peers, processes
from megatron_cp.bench import context as bench_context
from megatron_cp.bench.comparison import (
    WHOLE,
    AttentionShape,
    BackendResult,
    Comparison,
)
from megatron_cp.bench.context import BackendReport, Selection, bench
from megatron_cp.bench.pairs import Ratio, pairs_of, ratio_of
from megatron_cp.bench.predict import Forecast
from megatron_cp.bench.processes import QUIET
from megatron_cp.cli import app
from megatron_cp.cli.bench import UPSTREAM
from megatron_cp.comm import in_process
from megatron_cp.context import BACKENDS
from megatron_cp.context.self_check import LARGEST_ERROR
from megatron_cp.context.trace.events import Problem
from megatron_cp.context.trace.record import record

KEYS = {"backend", "ranks", "seq", "forward", "backward", "share_of_ideal", "sent", "peak", "max_error"}


# click before 8.2 shows stderr behind stdout unless it is told
SEPARATE = {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}


def run(*words):
    return CliRunner(**SEPARATE).invoke(app, ["bench", "context", *words])


@pytest.mark.smoke
def test_every_backend_is_timed_and_checked(tmp_path):
    picture = tmp_path / "bench.png"
    result = run("--seq", "256", "--rounds", "1", "--json", "--plot", str(picture))
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout[result.stdout.index("[") :])
    assert [row["backend"] for row in rows] == [*BACKENDS.names, *UPSTREAM]
    for row in rows:
        assert set(row) == KEYS
    *ours, megatron, torch_own = rows
    for row in ours:
        assert row["max_error"] < 1e-5
        assert min(row["forward"], row["backward"], row["sent"], row["peak"]) > 0
    # the scores alone, of 8 heads
    assert (megatron["ranks"], megatron["max_error"] < 1e-5) == (1, True)
    assert megatron["peak"] > 8 * 256**2 * 4
    assert torch_own["forward"] is None
    assert "torch context_parallel, S=256: refused: " in result.stderr
    assert "auto, S=256: " in result.stderr
    assert picture.stat().st_size > 10_000


@pytest.fixture(scope="module")
def small_rows():
    selection = Selection(("zigzag", "ulysses"), predict=True)
    return {row.backend: row for row in bench(selection, 2, [AttentionShape(256, heads=2, kv_heads=2)], 1).rows}


def test_traffic_is_the_formulas_bytes(small_rows):
    unit = 128 * 2 * 64 * 4
    # the later rank sends its K and V in each pass, and the gradients of the half of the other's that it saw
    assert small_rows["zigzag"].sent == 5 * unit
    assert small_rows["ulysses"].sent == 8 * unit // 2


def test_prediction_stands_beside_the_times(small_rows):
    assert small_rows[WHOLE].predicted is None
    for row in (small_rows["zigzag"], small_rows["ulysses"]):
        assert min(row.predicted) > 0
        assert set(row.as_json()) == KEYS | {"predicted_forward", "predicted_backward"}


@pytest.mark.parametrize("backend", ["zigzag", "ulysses"])
def test_prediction_comes_from_tiles_of_the_same_run(backend, monkeypatch):
    # each kernel call is said to take seconds, beside which a link and a memory take nothing on any machine
    monkeypatch.setattr(comparison.TimedPasses, "medians", property(lambda timed: (300.0, 700.0)))

    def body(fabric):
        shape = AttentionShape(256, heads=2, kv_heads=2)
        compared = Comparison(fabric, torch.device("cpu"), shape, "torch")
        forecast = Forecast(compared, [backend], native=False)
        forecast.time()
        return forecast.predicted(BackendResult(backend=backend, ranks=2, seq=256))

    trace = record(Problem(backend, 2, 256, heads=2, kv_heads=2, head_dim=64, dtype="float32"))
    calls = [max(len(list(run.calls(rank))) for rank in range(2)) for run in (trace.forward, trace.backward)]
    for predicted in in_process(2, body):
        assert predicted == pytest.approx((300 * calls[0], 700 * calls[1]), rel=0.05)


def test_a_wrong_backend_gets_no_figures(monkeypatch):
    monkeypatch.setitem(LARGEST_ERROR, torch.float32, -1.0)
    monkeypatch.setattr(processes.mp, "spawn", _in_this_process)
    with pytest.raises(RuntimeError, match="no figure of this run can be trusted"):
        bench(Selection(("zigzag",)), 1, [AttentionShape(64)], 1)


def _in_this_process(function, args, nprocs):
    assert nprocs == 1
    function(0, *args)


def test_competing_load_is_said_instead_of_a_verdict(monkeypatch):
    row = BackendResult(
        backend="zigzag",
        ranks=2,
        seq=64,
        forward=0.1,
        backward=0.2,
        share_of_ideal=0.5,
        sent=1,
        peak=1,
        max_error=1e-7,
    )

    def reported(core_share, cores):
        report = BackendReport(rows=[row], kernel="torch", reason="", core_share=core_share, cores=cores)
        monkeypatch.setattr(bench_context, "bench", lambda *args, **kwargs: report)
        return run("--seq", "64", "--ranks", "2").stdout

    loud = reported(core_share=0.6, cores=2)
    assert "No verdict: a rank got only 60% of its core" in loud
    assert "0.500" not in loud
    assert "2 ranks share 1 cores: only exactness" in reported(core_share=0.5, cores=1)
    assert "0.500" in reported(core_share=0.99, cores=2)


# Megatron's imports warn, and other tests have them done in processes of their own
@pytest.mark.filterwarnings("ignore")
def test_scores_that_do_not_fit_are_refused_in_words(monkeypatch):
    monkeypatch.setattr(processes.mp, "spawn", _in_this_process)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2**20))
    *_, megatron, _ = bench(Selection((), upstream=UPSTREAM), 1, [AttentionShape(256)], 1).rows
    assert megatron.forward is None
    assert megatron.problem.startswith("refused: the scores of all pairs are ")


class TimedPasses:
    """What a pair needs of a candidate."""

    def __init__(self, name, layout, trusted, forward, backward):
        self.entry = SimpleNamespace(name=name, layout=layout, trusted=trusted)
        self.seconds = (forward, backward)


def test_pairs_compare_rounds_of_one_layout():
    ours = TimedPasses("zigzag", "zigzag", True, [1.0, 2.0, 4.0], [1.0, 1.0, 1.0])
    theirs = TimedPasses("other", "zigzag", False, [2.0, 1.0, 5.0], [0.5, 0.5, 2.0])
    elsewhere = TimedPasses("other ring", "contiguous", False, [1.0] * 3, [1.0] * 3)
    (pair,) = pairs_of([ours, theirs, elsewhere], 64)
    assert (pair.forward, pair.backward, pair.rounds) == (Ratio(1.25, 0.5, 2.0, 2), Ratio(0.5, 0.5, 2.0, 1), 3)


def test_the_interval_of_a_median_is_the_sign_tests():
    # tables of the sign test: 95% leave out one value on each side of 9, three of 15, seventeen of 49
    for rounds, left_out in ((3, 0), (8, 0), (9, 1), (15, 3), (49, 17)):
        ratio = ratio_of([float(value) for value in range(rounds)])
        assert (ratio.low, ratio.high) == (left_out, rounds - 1 - left_out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--backend", "zigzig"], "did you mean 'zigzag'"),
        (["--dtype", "float31"], "did you mean 'float32'"),
        (["--plot", "bench.gif"], "--plot takes a file that ends in one of: .png, .svg, .pdf; got 'bench.gif'"),
        (["--predict", "--batch", "2"], "--predict needs --batch 1"),
        # the ranks find it, which have to be started
        pytest.param(
            ["--seq", "30", "--ranks", "4"],
            "needs S divisible by 2 * context_parallel_size = 8, got S = 30; pad to 32",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_bad_input_is_refused(words, message):
    result = run(*words)
    assert result.exit_code != 0
    assert message in str(result.exception)


def test_quiet_threshold_is_near_a_whole_core():
    assert 0.9 < QUIET < 1


@pytest.mark.slow
def test_native_layouts_save_bringing_tokens_into_place():
    small = ("--backend", "striped", "--seq", "128", "--heads", "2", "--rounds", "1", "--json")
    (native,), (zigzag,) = (json.loads(run(*small, *more).stdout) for more in (["--native"], []))
    assert native["max_error"] < 1e-5
    assert 0 < native["sent"] < zigzag["sent"]


def test_missing_peers_are_named_with_their_extra(monkeypatch):
    monkeypatch.setattr(peers, "_version", lambda package: None)
    result = run("--peers", "--backend", "zigzag", "--seq", "64")
    assert "no peer is installed; pip install 'megatron-cp[peers]'" in str(result.exception)
