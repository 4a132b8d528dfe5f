"""A schedule in a file: per rank one line of its computations, such as 0F0 0F1 0I0 0W0 0I1 0W1."""

from pathlib import Path

from megatron_cp.errors import Refused
from megatron_cp.pipeline.action import FORWARD, flat
from megatron_cp.pipeline.schedule import Schedule, parse


def read(file: Path) -> Schedule:
    """Return the schedule that `file` holds, not checked; its name is the file's.

    Raises ValueError for a file that cannot be read, for text that is no table, and for microbatches that are left out.
    """
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{file} cannot be read: {getattr(error, 'strerror', None) or 'it is no text'}") from None
    try:
        schedule = parse(text, file.stem)
    except ValueError as error:
        raise Refused(f"{file}: {error}") from None
    forwards = sum(action.kind == FORWARD for actions in schedule.table for action in flat(actions))
    if schedule.micros > forwards:
        raise Refused(
            f"{file}: microbatch {schedule.micros - 1} among {forwards} forwards; number the microbatches 0, 1, 2 and "
            "so on"
        )
    return schedule
