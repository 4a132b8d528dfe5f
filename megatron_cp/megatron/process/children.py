"""A rank that is killed takes the processes that it started with it.

Checkpoint writers, their queue and data loaders wait for their rank for ever. torchrun ends the other ranks of a killed
one, but not what that one has started; whoever reads the job's output would then wait for its end in vain.
"""

import contextlib
import os
import subprocess
from collections.abc import Iterator

# torchrun makes each rank the leader of a session; `kill 0` means everybody in it
WATCH = ("sh", "-c", "trap '' TERM; read -r done || kill -KILL 0")


@contextlib.contextmanager
def ended_with_this_rank() -> Iterator[None]:
    """Inside the context the death of this process, where it leads a session, is the death of all that it started."""
    if os.getsid(0) != os.getpid():
        yield
        return
    watcher = subprocess.Popen(WATCH, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert watcher.stdin is not None
    # the pipe must end with this process, and not with the last one that it forked
    os.register_at_fork(after_in_child=watcher.stdin.close)
    try:
        yield
    finally:
        watcher.communicate(b"done\n")
