"""A checkpoint that could not be written ends the run with one line on every rank: who failed, why, what is left.

Megatron's own exception carries the type of the error only, and on rank 0 only; the reason is in its writer's log.
"""

import contextlib
import errno
import logging
import shutil
import traceback
from collections.abc import Iterator
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from megatron_cp.errors import CannotRun
from megatron_cp.runlog import checkpoint_iteration

WRITER = "megatron.core.dist_checkpointing.strategies.filesystem_async"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Kept(logging.Handler):
    """Keeps the first error that a writer logs; it names the cause, the later ones its consequences."""

    reason = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.reason = self.reason or record.getMessage()


@contextlib.contextmanager
def explained(save: str | None) -> Iterator[None]:
    """Turn a failed save into the folder `save` inside the context into RuntimeError with everything in one line."""
    kept = _Kept(logging.ERROR)
    logging.getLogger(WRITER).addHandler(kept)
    try:
        yield
    except CheckpointException as error:
        if save is None:
            raise
        raise CannotRun(_line(Path(save), kept.reason or _elsewhere(error))) from error
    except OSError as error:
        if save is None or error.errno not in NO_ROOM or not _in_a_save(error):
            raise
        raise CannotRun(_line(Path(save), str(error))) from error
    finally:
        logging.getLogger(WRITER).removeHandler(kept)


def _elsewhere(error: CheckpointException) -> str:
    # only rank 0 hears who it was, and a writer in the background has told its reason to the log alone
    ranks = ", ".join(str(rank) for rank in sorted(error.failures))
    return f"on rank {ranks}, whose line or the log says why" if ranks else "on the rank that rank 0's line names"


def _in_a_save(error: OSError) -> bool:
    # rank 0 also writes the index, the arguments and the tracker, without its writer
    return any("checkpoint" in frame.filename for frame in traceback.extract_tb(error.__traceback__))


def _line(save: Path, reason: str) -> str:
    done = checkpoint_iteration(save)
    free = f"{shutil.disk_usage(save).free / 1e9:,.1f} GB are free there" if save.is_dir() else "it is not there"
    left = "its tracker names no earlier one" if done is None else f"the next start goes on from iteration {done}"
    return f"a checkpoint could not be written to {save}: {reason}; {free}, and {left}"
