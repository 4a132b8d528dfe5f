"""Tell the job's script that the run has saved and left before its last iteration, because it was told to.

torchrun exits 1 after SIGTERM whether or not its ranks saved, so that its status does not tell whether there is
something to go on from. Megatron leaves with SystemExit out of its training loop, with the checkpoint complete.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_cp import config
from megatron_cp.runlog import checkpoint_iteration


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """Leave `unfinished-JOB.json` in the --save folder when a job's run inside the context stops in time to go on."""
    try:
        yield
    except SystemExit as left:
        job = config.variable("SLURM_JOB_ID")
        if job and not left.code and config.variable("RANK", "0") == "0":
            _note(job)
        raise


def _note(job: str) -> None:
    args = _arguments()
    done = getattr(args, "curr_iteration", -1) + 1
    if args is None or not args.save or not 0 < done < args.train_iters or _was_planned(args, done):
        return
    folder = Path(args.save)
    if checkpoint_iteration(folder) == done:
        _write(folder / f"unfinished-{job}.json", {"iteration": done, "of": args.train_iters})


def _arguments() -> Any:
    from megatron.training import get_args

    try:
        return get_args()
    except AssertionError:
        # it did not get as far as that
        return None


def _was_planned(args: Any, done: int) -> bool:
    # these mean that somebody wants to look first
    at_interval = bool(args.exit_interval) and done % args.exit_interval == 0
    return at_interval or done in (args.phase_transition_iterations or ())


def _write(path: Path, what: dict[str, int]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(what) + "\n", encoding="utf-8")
    os.replace(part, path)
