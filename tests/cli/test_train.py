"""`megatron-cp train` runs the command, passes on what it prints, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_cp import cli, report
from megatron_cp.cli import train
from megatron_cp.cli.output import EveryLine
from megatron_cp.recipe.command import Command
from megatron_cp.runlog import LOG_NAME, TEXT_NAME, starts

# stands for the trainer: logs each iteration that its arguments and a checkpoint leave to do
TRAINER = """
import argparse, json, os, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("--train-iters", type=int)
parser.add_argument("--save")
parser.add_argument("--load")
args, rest = parser.parse_known_args()
tracker = pathlib.Path(args.save, "latest_checkpointed_iteration.txt")
done = int(tracker.read_text()) if args.load else 0
for step in range(done + 1, args.train_iters + 1):
    print(f" iteration {step}/ {args.train_iters} | elapsed time per iteration (ms): 100.0 | "
          f"global batch size: 2 | lm loss: {6 - step:.6E} | ", flush=True)
tracker.write_text(str(args.train_iters))
said = {"backend": "zigzag", "kernel": "torch", "cp_bytes_per_step": 3000000, "peak_rss_bytes": 5000000}
print("[megatron-cp] summary " + json.dumps(said), flush=True)
"""
RECIPE = """
LAUNCH:
  entry: stand_in
MODEL_ARGS:
  --num-layers: 1
  --seq-length: 50
  --mock-data: true
  --train-iters: 2
  --save: ckpt
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stand_in.py").write_text(TRAINER)
    (tmp_path / "run.yaml").write_text(RECIPE)
    return tmp_path


def wait_for(condition: object, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_run_is_logged_summed_up_and_resumed(here: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    with pytest.raises(train.typer.Exit) as first:
        train.train("run.yaml")
    shown = capfdbinary.readouterr().out.decode()
    assert first.value.exit_code == 0
    assert " iteration 2/ 2 | elapsed time per iteration (ms): 100.0 | global batch size: 2 | lm loss: 4.0" in shown
    assert "backend           zigzag" in shown
    assert "tokens/s          1,000 (median step 100 ms)" in shown
    assert "bytes sent by CP  3.0 MB per step" in shown
    assert "loss              5.0000 at iteration 1, 4.0000 at iteration 2" in shown
    assert "checkpoint        ckpt/iter_0000002" in shown
    assert (here / "ckpt" / "loss.png").read_bytes().startswith(b"\x89PNG")

    with pytest.raises(train.typer.Exit):
        train.train("run.yaml", ["--train-iters", "4"])
    shown = capfdbinary.readouterr().out.decode()
    assert "[megatron-cp] resumes from the checkpoint of iteration 2 in ckpt" in shown
    assert "loss              5.0000 at iteration 1, 2.0000 at iteration 4" in shown
    assert len((here / "ckpt" / LOG_NAME).read_text().splitlines()) == 4
    kept = (here / "ckpt" / TEXT_NAME).read_text()
    assert kept.count("iteration 1/ 2 |") == kept.count("iteration 3/ 4 |") == 1
    found = report.read(here / "ckpt")
    assert found.facts["recipe"] == "run"
    assert {"command", "versions", "host", "started"} < found.facts.keys()
    assert found.done
    assert len(starts(here / "ckpt")) == 2

    train.train("run.yaml", ["--train-iters", "4"])
    shown = capfdbinary.readouterr().out.decode()
    assert shown == (
        "[megatron-cp] all 4 iterations are done and saved in ckpt; "
        "to go on: megatron-cp train run.yaml --train-iters 8; give another --save to start afresh\n"
    )
    train.train("run.yaml", ["--train-iters", "4", "--hidden-size", "8"])
    shown = capfdbinary.readouterr().out.decode()
    assert shown == (
        "[megatron-cp] all 4 iterations are done and saved in ckpt; the other flags given now were not compared with "
        "that run: give another --save to start afresh with them, or more than --train-iters 4 to go on\n"
    )
    with pytest.raises(ValueError, match="data prefix 'nowhere'"):
        train.train("run.yaml", ["--train-iters", "4", "--mock-data=false", "--data-path", "nowhere"])
    assert len((here / "ckpt" / LOG_NAME).read_text().splitlines()) == 4


def test_bytes_pass_unchanged_and_the_status_is_the_commands(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    code = (
        r"import sys; sys.stdout.buffer.write(b'a\r\n\xff\xfe no end of line'); print('why', file=sys.stderr); exit(7)"
    )
    status, steps, said = train._stream(Command({}, [sys.executable, "-c", code]), tmp_path, EveryLine())
    assert (status, steps, said) == (7, [], {})
    shown = capfdbinary.readouterr()
    assert shown.out == b"a\r\n\xff\xfe no end of line"
    log = tmp_path / TEXT_NAME
    assert shown.err.decode() == f"why\nmegatron-cp: the run failed; all that it printed is in {log}\n"
    kept = log.read_bytes()
    assert kept.startswith(b"[megatron-cp] 20")
    # lines of errors come between lines of output
    assert all(part in kept for part in (b"\na\r\n", b"\xff\xfe no end of line", b"why\n"))


def test_a_command_ended_by_a_signal_gives_the_shells_number(tmp_path: Path) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert train._stream(Command({}, [sys.executable, "-c", code]), tmp_path, EveryLine())[0] == 128 + signal.SIGKILL


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_command_too(tmp_path: Path, number: int, status: int) -> None:
    worker = f"import os, time; open('pid', 'w').write(str(os.getpid())); print({'x' * 70000!r}); time.sleep(60)"
    code = f"""
import sys
from pathlib import Path
from megatron_cp.cli import train
from megatron_cp.cli.output import EveryLine
from megatron_cp.recipe.command import Command
train.app = train.typer.Typer()
line = Command({{}}, [sys.executable, "-c", {worker!r}])
train.app.command()(lambda: train._stream(line, Path(), EveryLine()) and None)
train.app()
"""
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    pid = tmp_path / "pid"
    wait_for(lambda: pid.exists() and pid.read_text())
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == status
    if number == signal.SIGINT:
        assert said == (
            "megatron-cp: interrupted before its first step was logged; saved: iteration 4 in .; "
            "the same command goes on\n"
        )
    assert not alive(int(pid.read_text()))


def test_render_prints_what_train_would_run(here: Path) -> None:
    result = CliRunner().invoke(cli.app, ["render", "quickstart", "--lr", "1e-3", "--cp-comm-type", "ulysses"])
    assert result.exit_code == 0
    build, _, training = result.output.partition("\n")
    assert build.startswith("[ -f runs/data/python-stdlib.idx ] || ")
    assert "-m megatron_cp.pretrain_gpt" in training
    assert "--lr 1e-3" in training
    assert training.count("--cp-comm-type ") == 1


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--context-parallel-size", "4"], "TP=1 * PP=1 * CP=4 needs a multiple of 4 processes, got 2"),
        (["--seq-length", "510"], "--seq-length must be divisible by 2 * --context-parallel-size = 4, got 510"),
        (["--num-layer", "4"], "command line: unknown flag '--num-layer'; did you mean '--num-layers'?"),
        (["--cp-comm-type", "usp"], "--cp-comm-type usp needs two --hierarchical-context-parallel-sizes"),
        (["--data-path", "nowhere"], "data prefix 'nowhere'"),
        (["--cp-plan", "balanced"], "--cp-plan balanced does not do one context-parallel size for all microbatches"),
        (["--pp-schedule", "1f1b"], "--pp-schedule 1f1b needs --pipeline-model-parallel-size of at least 2, got 1"),
    ],
)
def test_a_refusal_is_one_line_before_anything_starts(here: Path, words: list[str], text: str) -> None:
    result = CliRunner().invoke(cli.app, ["train", "quickstart", *words])
    assert isinstance(result.exception, ValueError)
    assert text in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not (here / "runs").exists()


def test_a_truncated_corpus_is_refused(here: Path) -> None:
    (here / "short.idx").write_bytes(b"MMIDIDX\x00\x00")
    (here / "short.bin").write_bytes(b"")
    result = CliRunner().invoke(cli.app, ["train", "quickstart", "--data-path", "short"])
    assert "short.idx is truncated" in str(result.exception)


def test_a_split_without_documents_is_refused_before_anything_starts(here: Path) -> None:
    (here / "my.txt").write_text("Call me Ishmael. " * 50)
    assert CliRunner().invoke(cli.app, ["data", "build", "--input", "my.txt", "--output", "my"]).exit_code == 0
    result = CliRunner().invoke(cli.app, ["train", "quickstart", "--data-path", "my", "--save", "runs/mine"])
    assert "--split 98,2,0 leaves the validation dataset none of the 1 documents of my" in str(result.exception)
    assert not (here / "runs").exists()


def test_an_error_is_one_line_on_stderr(here: Path) -> None:
    (here / "bad.yaml").write_text("MODEL_ARGS: [\n")
    result = subprocess.run(
        [sys.executable, "-m", "megatron_cp", "train", "bad.yaml"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert result.stderr.startswith("megatron-cp: bad.yaml:2: not YAML: ")
    assert result.stderr.count("\n") == 1
