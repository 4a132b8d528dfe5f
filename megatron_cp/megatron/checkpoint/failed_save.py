"""Explain a save that failed, and keep a save that was interrupted from passing for a whole one.

Megatron's own exception carries the type of the error only, and on rank 0 only; the reason is in its writer's log. The
index of a checkpoint's files is written last. Over an older checkpoint of the same iteration it would replace the old
one, and an interrupted save would leave the old index over old and new files of equal sizes.
"""

import contextlib
import errno
import logging
import shutil
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from megatron_cp.errors import CannotRun
from megatron_cp.megatron.checkpoint.contents import INDEX
from megatron_cp.runlog import checkpoint_iteration

WRITER = "megatron.core.dist_checkpointing.strategies.filesystem_async"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Kept(logging.Handler):
    """Handler that keeps the first error that a writer logs, which names the cause; later ones are consequences."""

    reason = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.reason = self.reason or record.getMessage()


@contextlib.contextmanager
def explained(save: str | None) -> Iterator[None]:
    """Raise CannotRun with all causes in one line for a save into the folder `save` that fails inside the context."""
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


def save_without_old_index(
    old: Callable[..., Any], sharded_state_dict: Any, checkpoint_dir: str, *args: Any, **kwargs: Any
) -> Any:
    """Save as Megatron does, into a folder whose old index is removed first.

    Every rank removes it before its own first file, and the new index comes after the last file of all ranks, so that
    no rank has to wait for another.
    """
    Path(checkpoint_dir, INDEX).unlink(missing_ok=True)
    return old(sharded_state_dict, checkpoint_dir, *args, **kwargs)


def _elsewhere(error: CheckpointException) -> str:
    # only rank 0 knows which rank it was, and a writer in the background only logs its reason
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
