"""A terminal shows one line of a run, and after a failure the reason."""

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from megatron_cp import runlog
from megatron_cp.cli import train
from megatron_cp.cli.output import EveryLine, ProgressLine, Reason, progress
from megatron_cp.recipe.command import Command

STEP = (
    " iteration {}/ 10 | elapsed time per iteration (ms): 500.0 | learning rate: 1.0E-03 | global batch size: 4 | "
    "lm loss: {:.6E} | "
)


def step(number: int, loss: float) -> runlog.Iteration:
    found = runlog.read_iteration(STEP.format(number, loss))
    assert found is not None
    return found


def test_a_line_has_step_loss_speed_and_time_left() -> None:
    assert progress([step(1, 5.0), step(2, 4.25)], seq=100) == "step 2/10  loss 4.2500  800 tokens/s  0:00:04 left"


def test_what_a_line_of_megatron_lacks_is_left_out() -> None:
    assert progress([runlog.Iteration(3, 9, {})], seq=100) == "step 3/9"


def shown_of(words: str, tmp_path: Path) -> tuple[int, str]:
    """Return the status of a run that does this, and what a terminal of 100 columns shows."""
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100)
    status, _, _ = train._stream(
        Command({}, [sys.executable, "-c", words]), tmp_path, ProgressLine("tiny", 100, terminal)
    )
    assert isinstance(terminal.file, io.StringIO)
    return status, terminal.file.getvalue()


def test_a_terminal_shows_our_lines_and_losses_but_not_the_dump(tmp_path: Path) -> None:
    code = f"""
import sys
print("  seq_length .... 100")
print("a warning", file=sys.stderr)
print("[megatron-cp] layers 1-4: [zigzag]")
print({STEP.format(7, 3.5)!r})
print(" validation loss at iteration 7 | lm loss value: 3.6E+00 | ")
print('[megatron-cp] summary {{}}')
"""
    status, shown = shown_of(code, tmp_path)
    assert status == 0
    assert "[megatron-cp] layers 1-4: [zigzag]\n" in shown
    assert " validation loss at iteration 7 | lm loss value: 3.6E+00 |\n" in shown
    assert "step 7/10  loss 3.5000  800 tokens/s  0:00:02 left" in shown
    assert not [word for word in ("seq_length", "a warning", "summary", "learning rate") if word in shown]
    kept = (tmp_path / runlog.TEXT_NAME).read_text()
    assert all(word in kept for word in ("seq_length", "a warning", "summary", "learning rate"))


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise RuntimeError('[no] such [device]')", "RuntimeError: [no] such [device]\n"),
        ("import sys; print('dump'); sys.exit('[megatron-cp] rank 0: refused')", "[megatron-cp] rank 0: refused\n"),
    ],
)
def test_a_failure_shows_its_reason(tmp_path: Path, code: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, shown = shown_of(code, tmp_path)
    assert status == 1
    assert reason in shown
    assert "dump" not in shown
    said = reason.removeprefix("[megatron-cp] ")
    assert capsys.readouterr().err == (
        f"megatron-cp: the run failed; all that it printed is in {tmp_path}/megatron.log\nmegatron-cp: {said}"
    )


@pytest.mark.parametrize(
    ("errors", "reason"),
    [
        (
            "a warning\n[megatron-cp] rank 1: refused\n[megatron-cp] rank 0: refused too\nValueError: later\n"
            "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: ",
            "rank 1: refused",
        ),
        (
            "[rank1]: KeyError: 1\n[rank1]: torch.OutOfMemoryError: CUDA out of memory\n"
            "[rank0]: RuntimeError: Connection closed by peer\nChildFailedError: it",
            "[rank1]: torch.OutOfMemoryError: CUDA out of memory",
        ),
        ("  exitcode  : -9 (pid: 12)\n  traceback : Signal 9 (SIGKILL) received by PID 12", "Signal 9 (SIGKILL)"),
        ("torch.distributed.elastic.multiprocessing.api.SignalException: Process 1 got signal: 15", ""),
    ],
)
def test_the_reason_is_what_a_rank_said_first(errors: str, reason: str) -> None:
    found = Reason()
    for line in errors.splitlines():
        found.error(line)
    assert found.text.removesuffix(" received by PID 12") == reason


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stand_in.py").write_text(f"print('  seq_length .... 100'); print({STEP.format(10, 3.5)!r})")
    (tmp_path / "run.yaml").write_text(
        "LAUNCH:\n  entry: stand_in\nMODEL_ARGS:\n  --num-layers: 1\n  --seq-length: 100\n  --mock-data: true\n"
    )
    return tmp_path


def test_train_shows_the_line_on_a_terminal(here: Path) -> None:
    ours, its = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "megatron_cp", "train", "run.yaml"], stdout=its, stderr=its
    ) as process:
        os.close(its)
        shown = b""
        while part := read(ours):
            shown += part
    os.close(ours)
    assert process.returncode == 0, shown
    assert b"step 10/10" in shown
    assert b"seq_length" not in shown
    assert b"summary of run" in shown


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:
        # the end of a terminal
        return b""


def test_verbose_shows_all_on_a_terminal(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = []

    def stream(line: Command, folder: Path, shown: object) -> tuple[int, list[runlog.Iteration], dict[str, object]]:
        kinds.append(type(shown))
        return 1, [], {}

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(train, "_stream", stream)
    for verbose in (True, False):
        with pytest.raises(train.typer.Exit):
            train.train("run.yaml", verbose=verbose)
    assert kinds == [EveryLine, ProgressLine]
