"""`megatron-cp report` reads what runs leave behind, and says one line where there is nothing to read."""

import re
from base64 import b64decode
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_cp import report, runlog
from megatron_cp.cli import app

# as Megatron prints it; the third iteration has no finite gradient, the fourth was skipped
LOG = """\
  seq_length ...................................... 32
  world_size ...................................... 2
 [2026-11-21 11:28:23] iteration        1/       5 | consumed samples:            4 | elapsed time per iteration \
(ms): 900.0 | throughput per GPU (TFLOP/s/GPU): 0.4 | global batch size:     4 | lm loss: 4.901020E+00 | \
grad norm: 0.912 | number of skipped iterations:   0 | number of nan iterations:   0 |
[Rank 1] (after 1 iterations) memory (MB) | allocated: 80.5 | max allocated: 91.5 | reserved: 95.0 | max reserved: 95.0
[Rank 0] (after 1 iterations) memory (MB) | allocated: 80.5 | max allocated: 90.5 | reserved: 95.0 | max reserved: 95.0
 [2026-11-21 11:28:23] iteration        2/       5 | consumed samples:            8 | elapsed time per iteration \
(ms): 100.0 | throughput per GPU (TFLOP/s/GPU): 4.0 | global batch size:     4 | lm loss: 4.853310E+00 | \
grad norm: 0.934 | number of skipped iterations:   0 | number of nan iterations:   0 |
 [2026-11-21 11:28:30] iteration        3/       5 | consumed samples:           12 | elapsed time per iteration \
(ms): 200.0 | throughput per GPU (TFLOP/s/GPU): 2.0 | global batch size:     4 | lm loss: 4.789129E+00 | \
grad norm: inf | number of skipped iterations:   0 | number of nan iterations:   0 |
 [2026-11-21 11:28:30] iteration        4/       5 | consumed samples:           16 | elapsed time per iteration \
(ms): 400.0 | throughput per GPU (TFLOP/s/GPU): 1.0 | global batch size:     4 | number of skipped iterations:   1 | \
number of nan iterations:   0 |
"""


def reported(*words: object) -> str:
    done = CliRunner().invoke(app, ["report", *map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def row(text: str, label: str) -> str:
    found = re.search(rf"^{re.escape(label)}\s{{2,}}(.*)$", text, re.MULTILINE)
    assert found, text
    return found[1]


@pytest.fixture
def logged(tmp_path: Path) -> Path:
    (tmp_path / "slurm-7.out").write_text(LOG)
    return tmp_path


def test_a_log_gives_the_figures_of_its_run(logged: Path) -> None:
    text = reported(logged)
    assert row(text, "iterations") == "4, 1 to 4"
    assert row(text, "loss") == "4.9010 to 4.7891"
    # without the first: 4 sequences of 32 tokens in 0.1, 0.2 and 0.4 s
    assert row(text, "step time, s") == "0.2"
    assert row(text, "tokens/s") == "640"
    assert row(text, "TFLOP/s per rank") == "2"
    assert row(text, "memory, MB") == "92 at most"
    assert row(text, "skipped iterations") == "1: 4"
    assert row(text, "NaN iterations") == "1: 3"


def test_a_cluster_gives_the_share_of_its_peak(logged: Path, tmp_path: Path) -> None:
    peak = float(report_peak("dgx-h100"))
    assert row(reported(logged, "--cluster", "dgx-h100"), "MFU") == f"{2e12 / peak:.1%}"


def report_peak(cluster: str) -> float:
    from megatron_cp.hardware.cluster_file import load_cluster

    return load_cluster(cluster).gemm("bfloat16").peak


def test_a_recipe_gives_the_prediction(logged: Path) -> None:
    from megatron_cp.cli.estimate import estimate_recipe
    from megatron_cp.recipe import recipe

    found = estimate_recipe(recipe.load("llama3.1-8b-8k-h100x8", {"DATA_PATH": "corpus"}))
    text = reported(logged, "--recipe", "llama3.1-8b-8k-h100x8")
    assert row(text, "predicted step time, s").startswith(f"{found.seconds:.5g}, {found.seconds / 0.2 - 1:+.1%} of")
    # the recipe's sequence length goes before the log's
    assert row(text, "tokens/s") == f"{4 * found.seq / 0.2:,.5g}"


def test_a_prediction_names_what_it_leaves_out(logged: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("extends: [recipes/llama3.1-8b-8k-h100x8]\nMODEL_ARGS:\n  --optimizer-cpu-offload: true\n")
    assert row(reported(logged, "--recipe", own), "not in the estimate") == "--optimizer-cpu-offload"
    assert "<th>not in the estimate</th><td>--optimizer-cpu-offload</td>" in (logged / "report.html").read_text()


def test_the_page_has_the_picture_in_it(logged: Path) -> None:
    reported(logged, "--output", logged / "page.html")
    page = (logged / "page.html").read_text()
    picture = re.search(r'src="data:image/png;base64,([^"]+)"', page)
    assert picture
    assert b64decode(picture[1]) == (logged / "page.png").read_bytes()
    assert b64decode(picture[1]).startswith(b"\x89PNG")
    # nothing is fetched from anywhere
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "<th>skipped iterations</th><td>1: 4</td>" in page


def test_what_a_recipe_or_a_log_says_is_no_markup() -> None:
    page = report.page("<b>", {"loss": "<script>"}, b"")
    assert "<b>" not in page
    assert "<script>" not in page


def test_our_own_log_and_megatrons_are_one_run(logged: Path) -> None:
    runlog.append(logged / runlog.LOG_NAME, runlog.Iteration(4, 5, {"lm loss": 4.5}))
    runlog.append(logged / runlog.LOG_NAME, runlog.Iteration(5, 5, {"lm loss": 4.25}))
    run = report.read(logged)
    assert [step.loss for step in run.steps] == [4.90102, 4.85331, 4.789129, 4.5, 4.25]
    assert run.sources == ["Megatron's log", "iterations.jsonl"]


def test_event_files_are_read(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    (tmp_path / "tensorboard").mkdir()
    writer = EventFileWriter(str(tmp_path / "tensorboard"))
    scalars = {"lm loss": 4.5, "iteration-time": 0.25, "batch-size": 4, "mem-max-allocated-bytes": 2**21, "other": 1}
    for step in (1, 2):
        for tag, value in scalars.items():
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            writer.add_event(Event(step=step, wall_time=step, summary=summary))
    writer.close()
    run = report.read(tmp_path)
    fields = {
        "lm loss": 4.5,
        "elapsed time per iteration (ms)": 250,
        "global batch size": 4,
        "memory (MB)": 2,
    }
    assert run.steps == [runlog.Iteration(number, 2, fields) for number in (1, 2)]
    assert row(reported(tmp_path), "samples/s") == "16"


def test_event_files_alone_want_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "events.out.tfevents.1.host").write_bytes(b"")
    monkeypatch.setattr(report, "has_tensorboard", lambda: False)
    with pytest.raises(RuntimeError, match=r"pip install 'megatron-cp\[report\]'"):
        report.read(tmp_path)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["no-such-run"], "no folder no-such-run"),
        (["."], "no iteration in "),
        ([".", "--output", "page.pdf"], r"must be a \.html file, got 'page\.pdf'"),
        ([".", "--recipe", "quickstrat"], "did you mean 'quickstart'"),
        ([".", "--cluster", "dgx-h10"], "did you mean 'dgx-h100'"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], text: str, logged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if words == ["."]:
        (logged / "slurm-7.out").write_text("nothing of interest\n")
    with pytest.raises(ValueError, match=text) as error:
        reported(*words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0\xff\xfe" * 50,
        b"3\nnull\n[1]\n",
        b'{"iteration": "a", "of": {}}\n',
        b"[" * 100_000,
        b'{"iteration": 1}',
    ],
)
@pytest.mark.parametrize("name", [runlog.LOG_NAME, "run.log", "events.out.tfevents.1.host"])
def test_garbage_is_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert isinstance(done.exception, (ValueError, RuntimeError)), done.exception
    assert "no iteration in" in str(done.exception) or "TensorBoard's event files only" in str(done.exception)


def test_values_that_are_no_numbers_are_left_out_of_the_log(tmp_path: Path) -> None:
    lines = (
        '{"iteration": 1, "of": 2, "lm loss": "x", "grad norm": 1.5}\n\xff\n{"iteration": 2, "of": 2, "lm loss": 3.0}\n'
    )
    (tmp_path / runlog.LOG_NAME).write_bytes(lines.encode("latin-1"))
    assert [step.fields for step in runlog.read(tmp_path / runlog.LOG_NAME)] == [{"grad norm": 1.5}, {"lm loss": 3.0}]
