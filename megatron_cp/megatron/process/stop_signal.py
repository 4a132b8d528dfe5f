"""Stop with everything saved on SIGTERM, on SIGUSR2 or when a file asks for it, and leave a file for the job's script.

Megatron's signal handler saves after the iteration and leaves with SystemExit. torchrun exits 1 after SIGTERM whether
or not its ranks saved, so that its status does not tell whether there is something to go on from: a file does.

Megatron handles one signal, and agrees on it with all ranks after each iteration. SIGUSR2, with which many job scripts
warn of the time limit (`#SBATCH --signal=USR2@600`), and a file `exit` in the --save folder become that signal.
"""

import atexit
import contextlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from megatron_cp import config
from megatron_cp.megatron.run import say
from megatron_cp.runlog import checkpoint_iteration

EXIT_FILE = "exit"
SECONDS_BETWEEN_LOOKS = 10


@contextlib.contextmanager
def noted(save: str | None) -> Iterator[None]:
    """Leave `unfinished-JOB.json` in the folder `save` when a job's run inside the context stops in time to go on.

    `save` is None for a run that does not save when it is told to stop. A run that a file stopped leaves no such note:
    the user asked for its end.
    """
    if save is None:
        yield
        return
    _start_writers()
    with _usr2_as_sigterm(), _watched(Path(save)) as asked:
        job = config.variable("SLURM_JOB_ID")
        with _marked(Path(save) / f"unfinished-{job}.json", asked) if job else contextlib.nullcontext():
            yield


@contextlib.contextmanager
def _marked(marker: Path, asked: threading.Event) -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, _leaving(marker, asked))
    try:
        yield
    except SystemExit as left:
        done = None if left.code or asked.is_set() else _stopped_at()
        if done is not None and checkpoint_iteration(marker.parent) == done:
            _leave(marker)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _usr2_as_sigterm() -> Iterator[None]:
    """Pass SIGUSR2 on as SIGTERM inside the context, to whatever handles that at the time."""
    before = signal.signal(signal.SIGUSR2, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR2, before)


@contextlib.contextmanager
def _watched(folder: Path) -> Iterator[threading.Event]:
    """Send rank 0 SIGTERM when a file `exit` appears in the folder, and remove it; the event says that it appeared."""
    asked, over = threading.Event(), threading.Event()

    def watch() -> None:
        file = folder / EXIT_FILE
        while not over.wait(SECONDS_BETWEEN_LOOKS):
            # Megatron makes it with the first checkpoint only
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
            if file.exists():
                asked.set()
                say(f"{file}: saves and exits after this iteration")
                with contextlib.suppress(OSError):
                    file.unlink()
                os.kill(os.getpid(), signal.SIGTERM)
                return

    if config.variable("RANK", "0") == "0":
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield asked
    finally:
        over.set()


def _start_writers() -> None:
    """Start the processes that Megatron saves with, which then ignore both signals: their queue and their server.

    SLURM and torchrun signal every process of a rank. Megatron starts these later, with the default handler, so that a
    signal would end them, and with them the save that it asks for.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue

    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGUSR2)}
    # new programs inherit the ignored signal, and so do the processes that the server forks
    get_write_results_queue()
    forkserver.ensure_running()
    for number, handler in before.items():
        signal.signal(number, handler)
    atexit.register(_end_writers)


def _end_writers() -> None:
    # multiprocessing would send them SIGTERM when this process ends, and wait
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _leaving(marker: Path, asked: threading.Event) -> Callable[[int, Any], None]:
    """Return a handler for the time before Megatron handles the signal, when nothing has to be saved."""

    def leave(number: int, frame: Any) -> None:
        if not asked.is_set():
            _leave(marker)
        raise SystemExit(128 + number)

    return leave


def _stopped_at() -> int | None:
    """Return the iterations that were done when the run was told to stop, or None when it was not."""
    args = _arguments()
    done = getattr(args, "curr_iteration", -1) + 1
    if args is None or not 0 < done < args.train_iters or _was_planned(args, done):
        return None
    return done


def _arguments() -> Any:
    from megatron.training import get_args

    try:
        return get_args()
    except AssertionError:
        # the run ended before the arguments were parsed
        return None


def _was_planned(args: Any, done: int) -> bool:
    # the user asked for these ends and decides what follows
    at_interval = bool(args.exit_interval) and done % args.exit_interval == 0
    return at_interval or done in (args.phase_transition_iterations or ())


def _leave(marker: Path) -> None:
    if config.variable("RANK", "0") != "0":
        return
    marker.parent.mkdir(parents=True, exist_ok=True)
    part = marker.with_suffix(".part")
    part.write_text(json.dumps({"iteration": checkpoint_iteration(marker.parent) or 0}) + "\n", encoding="utf-8")
    os.replace(part, marker)
