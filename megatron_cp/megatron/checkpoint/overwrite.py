"""A checkpoint that is written over an older one of the same iteration is not one until it is whole.

Megatron and torch write the index of the files last, over the old one. A save that ended before that would leave the
old index over old and new files, whose sizes are the same.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_cp.megatron.checkpoint.contents import INDEX


def save(old: Callable[..., Any], sharded_state_dict: Any, checkpoint_dir: str, *args: Any, **kwargs: Any) -> Any:
    """Save as Megatron does, into a folder without an index.

    Every rank removes it before its own first file, and the new one is written after everybody's last: nobody waits.
    """
    Path(checkpoint_dir, INDEX).unlink(missing_ok=True)
    return old(sharded_state_dict, checkpoint_dir, *args, **kwargs)
