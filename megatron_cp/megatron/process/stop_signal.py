"""Stop on SIGTERM with everything saved, and leave a file that tells the job's script.

Megatron's signal handler saves after the iteration and leaves with SystemExit. torchrun exits 1 after SIGTERM whether
or not its ranks saved, so that its status does not tell whether there is something to go on from: a file does.
"""

import atexit
import contextlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from megatron_cp import config
from megatron_cp.runlog import checkpoint_iteration


@contextlib.contextmanager
def noted(save: str | None) -> Iterator[None]:
    """Leave `unfinished-JOB.json` in the folder `save` when a job's run inside the context stops in time to go on.

    `save` is None for a run that does not save when it is told to stop.
    """
    job = config.variable("SLURM_JOB_ID")
    if save is not None:
        _start_writers()
    if save is None or not job:
        yield
        return
    marker = Path(save) / f"unfinished-{job}.json"
    before = signal.signal(signal.SIGTERM, _leaving(marker))
    try:
        yield
    except SystemExit as left:
        done = None if left.code else _stopped_at()
        if done is not None and checkpoint_iteration(Path(save)) == done:
            _leave(marker)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _start_writers() -> None:
    """Start the processes that Megatron saves with, which then ignore SIGTERM: the writers' queue and their server.

    SLURM and torchrun signal every process of a rank. Megatron starts these later, with the default handler, so that a
    signal would end them, and with them the save that it asks for.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # new programs inherit the ignored signal, and so do the processes that the server forks
    get_write_results_queue()
    forkserver.ensure_running()
    signal.signal(signal.SIGTERM, before)
    atexit.register(_end_writers)


def _end_writers() -> None:
    # multiprocessing would send them SIGTERM when this process ends, and wait
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _leaving(marker: Path) -> Callable[[int, Any], None]:
    """Return a handler for the time before Megatron handles the signal, when nothing has to be saved."""

    def leave(number: int, frame: Any) -> None:
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
