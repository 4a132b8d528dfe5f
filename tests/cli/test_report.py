"""`megatron-cp report` reads what runs leave behind, and says one line where there is nothing to read."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_cp import report, runlog
from megatron_cp.cli import app
from megatron_cp.plots.page import ShownRun, page

# as Megatron prints it; the third iteration has no finite gradient, the fourth was skipped
LOG = """\
  seq_length ...................................... 32
  world_size ...................................... 2
  context_parallel_size ........................... 2
  cp_comm_type .................................... ['p2p']
[megatron-cp] layers 1-4: zigzag, kernel torch
[megatron-cp] summary {"backend": "zigzag"}
 [2026-11-21 11:28:23] iteration        1/       5 | consumed samples:            4 | elapsed time per iteration \
(ms): 900.0 | throughput per GPU (TFLOP/s/GPU): 0.4 | global batch size:     4 | lm loss: 4.901020E+00 | \
grad norm: 0.912 | number of skipped iterations:   0 | number of nan iterations:   0 |
[Rank 1] (after 1 iterations) memory (MB) | allocated: 80.5 | max allocated: 91.5 | reserved: 95.0 | max reserved: 95.0
[Rank 0] (after 1 iterations) memory (MB) | allocated: 80.5 | max allocated: 90.5 | reserved: 95.0 | max reserved: 95.0
 [2026-11-21 11:28:23] iteration        2/       5 | consumed samples:            8 | elapsed time per iteration \
(ms): 100.0 | throughput per GPU (TFLOP/s/GPU): 4.0 | learning rate: 3.000000E-04 | global batch size:     4 | \
lm loss: 4.853310E+00 | grad norm: 0.934 | number of skipped iterations:   0 | number of nan iterations:   0 |
 validation loss at iteration 2 | lm loss value: 4.850000E+00 | lm loss PPL: 1.277404E+02 |
 [2026-11-21 11:28:30] iteration        3/       5 | consumed samples:           12 | elapsed time per iteration \
(ms): 200.0 | throughput per GPU (TFLOP/s/GPU): 2.0 | global batch size:     4 | lm loss: 4.789129E+00 | \
grad norm: inf | number of skipped iterations:   0 | number of nan iterations:   0 |
 [2026-11-21 11:28:30] iteration        4/       5 | consumed samples:           16 | elapsed time per iteration \
(ms): 400.0 | throughput per GPU (TFLOP/s/GPU): 1.0 | learning rate: 2.000000E-04 | global batch size:     4 | \
number of skipped iterations:   1 | number of nan iterations:   0 |
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
    assert row(text, "iterations") == "4 of 5 (1 to 4)"
    assert row(text, "tokens seen") == "512"
    assert row(text, "loss, nats per token") == "4.9010 to 4.7891"
    assert row(text, "validation loss, nats per token") == "4.8500"
    assert row(text, "learning rate") == "0.0003 at most, 0.0002 at the end"
    # without the first: 4 sequences of 32 tokens in 0.1, 0.2 and 0.4 s
    assert row(text, "step time, s") == "0.2"
    assert row(text, "tokens/s") == "640"
    assert row(text, "TFLOP/s per rank") == "2"
    assert row(text, "memory, MB") == "92 at most"
    assert row(text, "skipped iterations") == "1: 4"
    assert row(text, "NaN iterations") == "1: 3"


def test_a_cluster_gives_the_share_of_its_peak(logged: Path, tmp_path: Path) -> None:
    peak = float(report_peak("dgx-h100"))
    assert row(reported(logged, "--cluster", "dgx-h100"), "MFU, %") == f"{100 * 2e12 / peak:.1f}"


def report_peak(cluster: str) -> float:
    from megatron_cp.hardware.cluster_file import load_cluster

    return load_cluster(cluster).gemm("bfloat16").peak


def test_a_recipe_gives_the_prediction(logged: Path) -> None:
    from megatron_cp.cli.estimate import estimate_recipe
    from megatron_cp.recipe import recipe

    found = estimate_recipe(recipe.load("llama3.1-8b-8k-h100x8", {"DATA_PATH": "corpus"}))
    text = reported(logged, "--recipe", "llama3.1-8b-8k-h100x8")
    assert (
        row(text, "predicted step time, s") == f"{found.seconds:.5g}, {found.seconds / 0.2 - 1:.1%} above the measured"
    )
    # the recipe's sequence length goes before the log's
    assert row(text, "tokens/s") == f"{4 * found.seq / 0.2:,.5g}"


def test_a_prediction_names_what_it_leaves_out(logged: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("extends: [recipes/llama3.1-8b-8k-h100x8]\nMODEL_ARGS:\n  --optimizer-cpu-offload: true\n")
    assert row(reported(logged, "--recipe", own), "not in the estimate") == "--optimizer-cpu-offload"
    assert "<th>not in the estimate</th><td>--optimizer-cpu-offload</td>" in (logged / "report.html").read_text()


def test_a_prediction_below_the_measured_time_is_said_so(logged: Path) -> None:
    run = report.read(logged)
    against = report.Reference(step_seconds=0.05)
    assert report.table(run, report.curves(run, against), against)["predicted step time, s"] == (
        "0.05, 75.0% below the measured"
    )


def without_library(page: str) -> str:
    """A page without the library that draws, whose text has links and tags in it."""
    return re.sub(r"<script>/\*\*.*?</script>", "", page, flags=re.DOTALL)


def test_the_page_has_everything_in_it(logged: Path) -> None:
    reported(logged, "--output", logged / "page.html")
    page = (logged / "page.html").read_text()
    assert (logged / "page.png").read_bytes().startswith(b"\x89PNG")
    own = without_library(page)
    assert len(own) < len(page) / 10
    # nothing is fetched from anywhere
    assert not re.search(r'(src|href)="', own)
    assert "default-src 'none'" in own
    assert "<th>skipped iterations</th><td>1: 4</td>" in own
    assert "<th>processes</th><td>2: CP 2</td>" in own
    assert "<pre>layers 1-4: zigzag, kernel torch</pre>" in own
    assert "cp_comm_type = [&#x27;p2p&#x27;]" in own
    assert 'http-equiv="refresh"' not in own


def shown(**fields: object) -> ShownRun:
    empty = {"curves": {}, "tokens": {}, "hours": {}, "lost": {}, "predicted": None, "rows": {}, "said": []}
    return ShownRun(**{**empty, "arguments": {}, **fields})


def test_what_a_recipe_or_a_log_says_is_no_markup() -> None:
    run = shown(
        curves={"<b>": {1: 2.0}}, rows={"loss": "<script>"}, said=["<b>"], arguments={"<b>": "<b>"}, tokens={1: 2.0}
    )
    text = without_library(page({"<b>": run, "<i>": shown(arguments={"<b>": "<u>"})}, "<b>"))
    assert "\\u003cb>" in text
    assert not re.search("<[biu]>", text)
    assert "<td><script>" not in text


def test_values_that_are_no_numbers_are_gaps() -> None:
    text = page({"run": shown(curves={"loss, nats per token": {1: 2.0, 2: float("nan")}}, lost={"NaN": [2]})}, "run")
    assert '"y": [2.0, null]' in text
    # a cross beside the last loss
    assert '"name": "NaN iterations", "x": [2], "y": [2.0]' in text


def test_tokens_and_hours_lie_beside_the_iterations(logged: Path) -> None:
    run = report.read(logged)
    assert report.tokens_at(run, report.Reference()) == {1: 128, 2: 256, 3: 384, 4: 512}
    assert report.hours_at(run)[4] == pytest.approx((0.9 + 0.1 + 0.2 + 0.4) / 3600)


def test_runs_are_compared_side_by_side(logged: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    (other / "run.log").write_text(LOG.replace("context_parallel_size ........................... 2", "lr ... 1"))
    text = reported(logged, other)
    assert f"{logged.name}:\n" in text
    assert f"{other.name}:\n" in text
    found = without_library((logged / "compare.html").read_text())
    assert "<th>iterations</th><td>4 of 5 (1 to 4)</td><td>4 of 5 (1 to 4)</td>" in found
    assert "arguments that differ: 2" in found
    assert not (logged / "compare.png").exists()


def test_a_run_is_followed_until_it_is_done(tmp_path: Path) -> None:
    def add(number: int) -> None:
        runlog.append(tmp_path / runlog.LOG_NAME, runlog.Iteration(number, 3, {"lm loss": 5.0 - number}))

    seen = []

    def wait(seconds: float) -> None:
        seen.append(without_library((tmp_path / "report.html").read_text()))
        add(len(seen))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_cp.cli.report.time.sleep", wait)
        reported(tmp_path, "--live", "--every", "2")
    assert len(seen) == 3
    assert all('<meta http-equiv="refresh" content="2">' in page for page in seen)
    assert "before its first iteration" in seen[0]
    assert "<th>iterations</th><td>2 of 3 (1 to 2)</td>" in seen[2]
    last = (tmp_path / "report.html").read_text()
    assert "3 of 3 (1 to 3)" in last
    assert 'http-equiv="refresh"' not in without_library(last)


def test_the_busiest_expert_is_a_curve(logged: Path) -> None:
    (logged / "tokens_per_expert").mkdir()
    lines = (
        '{"iter": 2, "block": "decoder", "layer": 3, "tpe": [[10, 20], [30, 40]]}\n'
        '{"iter": 4, "block": "decoder", "layer": 3, "tpe": [[5, 5]]}\n{"iter": 5, "bl'
    )
    (logged / "tokens_per_expert/rank0.jsonl").write_text(lines)
    (logged / "tokens_per_expert/rank1.jsonl").write_text(lines.replace("40", "140"))
    run = report.read(logged)
    assert run.experts == {"decoder layer 3": {2: [40, 60, 40, 160], 4: [5, 5, 5, 5]}}
    found = report.curves(run, report.Reference())["decoder layer 3: busiest expert, times the mean"]
    assert found == {2: pytest.approx(160 * 4 / 300), 4: 1.0}


def test_choices_that_are_dropped_are_a_curve_of_each_layer(logged: Path) -> None:
    note = runlog.ExpertChoices
    runlog.note_experts(logged, 2, {"decoder layer 3": note(100, [9, 1], False), "mtp layer 1": note(8, [4, 4], False)})
    runlog.note_experts(logged, 4, {"decoder layer 3": note(100, [50, 30], False)})
    # the same iteration again, after a resume, and a line that was cut off
    runlog.note_experts(logged, 2, {"decoder layer 3": note(100, [45, 15], False)})
    with (logged / runlog.EXPERTS_NAME).open("a") as file:
        # no choices, a number that is none, and no list
        file.write('{"iteration": 6, "layer": "decoder layer 3", "made": 0, "tokens": [1], "dropless": false}\n')
        file.write('{"iteration": 6, "layer": "a", "made": Infinity, "tokens": [1], "dropless": false}\n')
        file.write('{"iteration": 6, "layer": "a", "made": 4, "tokens": "12", "dropless": false}\n[]\n')
        file.write('{"iteration": 6, "lay')
    # what Megatron counts of one rank is left out where all ranks are counted
    (logged / "tokens_per_expert").mkdir()
    other = '{"iter": 2, "block": "decoder", "layer": 0, "tpe": [[1, 2]]}\n'
    (logged / "tokens_per_expert/rank0.jsonl").write_text(other)
    line = f" iteration 4/ 5 | {runlog.DROPPED}: 20.0000 | number of skipped iterations:   0 |\n"
    with (logged / "slurm-7.out").open("a") as file:
        file.write(line)
    drawn = report.curves(report.read(logged), report.Reference())
    share = f"decoder layer 3: {report.DROPPED}"
    assert drawn[share] == {2: 40.0, 4: 20.0}
    assert drawn[f"all layers: {report.DROPPED}"] == {4: 20.0}
    assert drawn[f"decoder layer 3: {report.BUSIEST}"] == {2: 1.5, 4: 1.25}
    assert drawn[f"mtp layer 1: {report.DROPPED}"] == {2: 0.0}
    assert row(reported(logged), share) == "20"
    assert report.expert_loads(logged, 2) == {"decoder layer 3": [50, 30], "mtp layer 1": [4, 4]}


def test_a_run_without_a_capacity_is_called_dropless(logged: Path) -> None:
    runlog.note_experts(logged, 2, {"decoder layer 3": runlog.ExpertChoices(4, [3, 1], True)})
    text = reported(logged)
    assert row(text, report.DROPPED).startswith("0, dropless")
    assert f"decoder layer 3: {report.DROPPED}" not in text


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
        ([".", "."], "got one folder twice"),
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
