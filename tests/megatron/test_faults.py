"""A run that a fault ends goes on as if nothing had happened: the same steps, data and losses as the unbroken run.

Damaged files of a checkpoint are in `test_contents.py`, a failing step in `test_failure.py`. FAULT_RUNS=10 in the
environment kills a rank at ten random moments instead of one.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_cp import runlog
from megatron_cp.megatron.checkpoint import contents
from tests.megatron.pretraining import pretrain_losses, tiny
from tests.megatron.test_entry_points import environment
from tests.ranks import DIED, RankError, run_ranks, run_ranks_with_log

KILLS = int(os.environ.get("FAULT_RUNS", "1"))
STEPS = 4 * KILLS + 8
RANKS = 2
SECONDS_TO_END = 30
TO_FOUR = "--train-iters 4 --use-checkpoint-opt-param-scheduler"
IN_THE_BACKGROUND = "--async-save --use-persistent-ckpt-worker"

Losses = dict[int, float]


def flags(folder: Path, *more: str) -> list[str]:
    run = f"--train-iters {STEPS} --lr-decay-iters {STEPS} --context-parallel-size {RANKS} --cp-comm-type p2p"
    return tiny(run, f"--ckpt-format torch_dist --save-interval 2 --save {folder} --load {folder}", *more)


def in_process(folder: Path, *more: str) -> Losses:
    """The run's losses, unrounded, with ranks that are forked."""
    steps, log = run_ranks_with_log(RANKS, pretrain_losses, flags(folder, *more), False)
    assert list(printed(log)) == [step["iteration"] for step in steps[0]]
    return {step["iteration"]: step["loss"] for step in steps[0]}


def printed(log: str) -> Losses:
    """The losses as the log has them; consumed samples must say that no data was left out or came twice."""
    found = [step for step in map(runlog.read_iteration, log.splitlines()) if step]
    for step in found:
        assert step.fields["consumed samples"] == step.number * step.fields["global batch size"]
        assert step.fields["number of skipped iterations"] == 0
    return {step.number: step.fields["lm loss"] for step in found}


def as_printed(losses: Losses, steps: Iterable[int]) -> Losses:
    """What Megatron prints of a run that takes these steps: its second line is the mean of the first two."""
    first, second, *rest = steps
    mean = (losses[first] + losses[second]) / 2
    return {first: losses[first], second: mean, **{number: losses[number] for number in rest}}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Losses]:
    """A run that nothing happens to, with its checkpoints."""
    folder = tmp_path_factory.mktemp("unbroken")
    found = in_process(folder)
    assert list(found) == list(range(1, STEPS + 1))
    return folder, found


def copy(checkpoint: Path, folder: Path) -> None:
    shutil.copytree(checkpoint, folder / checkpoint.name)


@pytest.fixture
def started(unbroken: tuple[Path, Losses], tmp_path: Path) -> Path:
    """A save folder as the unbroken run had left it after iteration 2."""
    copy(unbroken[0] / "iter_0000002", tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    return tmp_path


def killed_job(folder: Path, chance: random.Random) -> tuple[str, int, float]:
    """Start the job, kill a rank at some moment after a checkpoint; what it printed, which rank, seconds to its end."""
    torchrun = [sys.executable, *f"-m torch.distributed.run --standalone --nproc-per-node {RANKS}".split()]
    command = [*torchrun, "-m", "megatron_cp.pretrain_gpt", *flags(folder)]
    victim, steps = chance.randrange(RANKS), chance.randint(3, 4)
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as job:
        assert job.stdout is not None
        before = list(until_iterations(job.stdout, steps))
        time.sleep(chance.uniform(0, 0.03))
        rank_process(job.pid, victim).send_signal(signal.SIGKILL)
        since = time.monotonic()
        # to the end of the pipe: whoever is left would hold it open
        log = "".join(before) + job.stdout.read()
        assert job.wait() != 0
    return log, victim, time.monotonic() - since


def until_iterations(lines: Iterator[str], count: int) -> Iterator[str]:
    for line in lines:
        yield line
        count -= runlog.read_iteration(line) is not None
        if not count:
            return


def rank_process(torchrun: int, rank: int) -> psutil.Process:
    workers = psutil.Process(torchrun).children()
    return next(worker for worker in workers if worker.environ().get("RANK") == str(rank))


@pytest.mark.slow
def test_a_killed_rank_is_named_and_the_job_goes_on(unbroken: tuple[Path, Losses], tmp_path: Path) -> None:
    _, expected = unbroken
    chance = random.Random(20)
    seen: set[int] = set()
    for _ in range(KILLS):
        first = (runlog.checkpoint_iteration(tmp_path) or 0) + 1
        log, victim, seconds = killed_job(tmp_path, chance)
        assert seconds < SECONDS_TO_END
        assert re.search(rf"rank +: {victim} \(local_rank: {victim}\)\n +exitcode +: -9 ", log), log[-3000:]
        assert "Signal 9 (SIGKILL) received by PID" in log
        found = printed(log)
        assert min(found) == first
        # the log has seven digits
        assert found == pytest.approx(as_printed(expected, found), rel=1e-6)
        seen |= set(found)
    first = (runlog.checkpoint_iteration(tmp_path) or 0) + 1
    assert first > 1
    rest = in_process(tmp_path)
    assert rest == {number: expected[number] for number in range(first, STEPS + 1)}
    assert seen | set(rest) == set(expected)


@pytest.mark.slow
def test_saves_in_the_background_are_whole_and_resume(unbroken: tuple[Path, Losses], tmp_path: Path) -> None:
    _, expected = unbroken
    four = f"{IN_THE_BACKGROUND} {TO_FOUR}"
    assert in_process(tmp_path, four) == {number: expected[number] for number in (1, 2, 3, 4)}
    assert runlog.checkpoint_iteration(tmp_path) == 4
    assert [contents.damage(folder) for folder in contents.iterations(tmp_path)] == [[], []]
    assert in_process(tmp_path, four, "--ckpt-step 2") == {number: expected[number] for number in (3, 4)}


def die_in_a_save(words: list[str], folder: Path) -> None:
    """Train, and kill rank 1 when its own file of this checkpoint is written, by itself or in the background."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    # as torchrun's ranks do
    os.setsid()
    write, rank = FileSystemWriterAsync.write_preloaded_data, os.getpid()

    def write_and_kill(*args: Any, **kwargs: Any) -> Any:
        written = write(*args, **kwargs)
        if os.environ["RANK"] == "1" and Path(kwargs["write_bucket"][0]).parent == folder:
            os.kill(rank, signal.SIGKILL)
        return written

    FileSystemWriterAsync.write_preloaded_data = staticmethod(write_and_kill)
    pretrain_losses(words, False)


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param("", id="over-a-whole-one", marks=pytest.mark.slow),
        pytest.param(IN_THE_BACKGROUND, id="in-the-background"),
    ],
)
def test_a_save_that_was_killed_is_not_resumed_from(unbroken: tuple[Path, Losses], started: Path, mode: str) -> None:
    if not mode:
        copy(unbroken[0] / "iter_0000004", started)
    with pytest.raises(RankError) as error:
        run_ranks(RANKS, die_in_a_save, flags(started, mode), started / "iter_0000004")
    assert error.value.errors[1] == f"{DIED} with exit code -9"
    assert contents.damage(started / "iter_0000004") == ["the index .metadata is missing: the save was interrupted"]
    assert contents.chosen(started) == started / "iter_0000002"

    _, expected = unbroken
    assert in_process(started, mode, TO_FOUR) == {number: expected[number] for number in (3, 4)}
    assert not contents.damage(started / "iter_0000004")
    assert runlog.checkpoint_iteration(started) == 4


@pytest.mark.slow
def test_a_full_disk_is_said_and_the_last_checkpoint_stays(unbroken: tuple[Path, Losses], started: Path) -> None:
    # every write to this device fails as on a disk without room
    (started / "iter_0000004").mkdir()
    full = started / "iter_0000004" / "__1_0.distcp"
    full.symlink_to("/dev/full")
    with pytest.raises(RankError) as error:
        run_ranks(RANKS, pretrain_losses, flags(started), False)
    for rank, text in error.value.errors.items():
        line = text.splitlines()[0]
        assert line.startswith(f"SystemExit: [megatron-cp] rank {rank}: a checkpoint could not be written to {started}")
        assert line.endswith("GB are free there, and the next start goes on from iteration 2")
    assert "No space left on device" in error.value.errors[1].splitlines()[0]
    assert contents.chosen(started) == started / "iter_0000002"

    full.unlink()
    _, expected = unbroken
    assert in_process(started, TO_FOUR)[3] == expected[3]
    assert not contents.damage(started / "iter_0000004")


def test_a_tracker_that_a_full_disk_left_empty_does_not_end_the_run_in_silence(started: Path) -> None:
    (started / "latest_checkpointed_iteration.txt").write_text("")
    with pytest.raises(RankError, match="should name an iteration, got ''; write 2, its latest whole checkpoint"):
        run_ranks(RANKS, pretrain_losses, flags(started), False)


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ("--tensor-model-parallel-size 2 --context-parallel-size 1", "not divisible by"),
        ("--pipeline-model-parallel-size 2 --context-parallel-size 2", "needs 4 processes, got 3"),
        ("--context-parallel-size 1", "(4) must be divisible by eval_micro_batch_size (2) * data_parallel_size (3)"),
    ],
)
def test_a_world_size_that_cannot_be_is_refused_on_every_rank(tmp_path: Path, sizes: str, text: str) -> None:
    with pytest.raises(RankError) as error:
        run_ranks(3, pretrain_losses, flags(tmp_path / "none", sizes))
    assert sorted(error.value.errors) == [0, 1, 2]
    for rank, message in error.value.errors.items():
        line = message.splitlines()[0]
        assert line.startswith(f"SystemExit: [megatron-cp] rank {rank}: ")
        assert text in line
