"""A run that saved because it was told to stop says so, and only then; saving survives the signal."""

import multiprocessing
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_cp.megatron.process import stop_signal
from tests.ranks import run_ranks


def leave(
    folder: Path, monkeypatch: pytest.MonkeyPatch, code: int = 0, saved: int = 7, rank: int = 0, **args: object
) -> bool:
    """Whether a run that leaves after 7 of 20 iterations, with the checkpoint of `saved`, leaves a marker."""
    said = {"curr_iteration": 6, "train_iters": 20, "exit_interval": None, "phase_transition_iterations": None, **args}
    monkeypatch.setattr(stop_signal, "_arguments", lambda: SimpleNamespace(**said))
    monkeypatch.setattr(stop_signal, "_start_writers", lambda: None)
    monkeypatch.setenv("RANK", str(rank))
    (folder / "latest_checkpointed_iteration.txt").write_text(str(saved))
    with pytest.raises(SystemExit), stop_signal.noted(str(folder)):
        raise SystemExit(code)
    return (folder / "unfinished-40007.json").exists()


@pytest.fixture(autouse=True)
def job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "40007")


def test_a_run_that_saved_and_left_early_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert leave(tmp_path, monkeypatch)
    assert (tmp_path / "unfinished-40007.json").read_text() == '{"iteration": 7}\n'
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".part"] == []


@pytest.mark.parametrize(
    "differs",
    [
        {"code": 1},
        {"saved": 5},
        {"rank": 1},
        {"train_iters": 7},
        {"exit_interval": 7},
        {"phase_transition_iterations": [7]},
    ],
    ids=lambda differs: next(iter(differs)),
)
def test_nothing_else_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, differs: dict[str, int]) -> None:
    assert not leave(tmp_path, monkeypatch, **differs)


def test_outside_a_job_nothing_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID")
    assert not leave(tmp_path, monkeypatch)


def test_a_signal_before_training_leaves_and_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_signal, "_start_writers", lambda: None)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left, stop_signal.noted(str(tmp_path / "save")):
        signal.raise_signal(signal.SIGTERM)
    assert left.value.code == 128 + signal.SIGTERM
    assert (tmp_path / "save" / "unfinished-40007.json").read_text() == '{"iteration": 0}\n'
    assert signal.getsignal(signal.SIGTERM) == before


def test_usr2_leaves_as_sigterm_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_signal, "_start_writers", lambda: None)
    before = signal.getsignal(signal.SIGUSR2)
    with pytest.raises(SystemExit) as left, stop_signal.noted(str(tmp_path)):
        signal.raise_signal(signal.SIGUSR2)
    assert left.value.code == 128 + signal.SIGTERM
    assert (tmp_path / "unfinished-40007.json").exists()
    assert signal.getsignal(signal.SIGUSR2) == before


def wait_for_a_signal() -> None:
    while True:
        time.sleep(0.01)


def test_a_file_asks_for_the_end_and_leaves_no_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_signal, "_start_writers", lambda: None)
    monkeypatch.setattr(stop_signal, "SECONDS_BETWEEN_LOOKS", 0.01)
    (tmp_path / "exit").touch()
    with pytest.raises(SystemExit) as left, stop_signal.noted(str(tmp_path)):
        wait_for_a_signal()
    assert left.value.code == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def save_after_a_signal() -> tuple[str, bool, bool]:
    """What comes through the writers' queue, and whether a writer lives after the signal, and after the run's end."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue

    os.setsid()
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: None)
    stop_signal._start_writers()
    writer = multiprocessing.get_context("forkserver").Process(target=time.sleep, args=(60,), daemon=True)
    writer.start()
    time.sleep(1)
    os.killpg(0, signal.SIGTERM)
    os.killpg(0, signal.SIGUSR2)
    time.sleep(0.5)
    get_write_results_queue().put("written")
    lives = writer.is_alive()
    stop_signal._end_writers()
    writer.join(10)
    return str(get_write_results_queue().get()), lives, writer.is_alive()


def test_saving_survives_a_signal_to_every_process_of_the_rank() -> None:
    assert run_ranks(1, save_after_a_signal) == [("written", True, False)]
