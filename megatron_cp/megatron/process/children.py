"""Kill a rank's child processes when the rank is killed.

Checkpoint writers, their queue and data loaders would wait for their rank without end. torchrun ends the other ranks of
a killed one, but not its child processes, which would keep the job's output open.
"""

import contextlib
import os
import subprocess
from collections.abc import Iterator

# torchrun makes each rank the leader of a session; `kill 0` reaches all its processes
WATCH = ("sh", "-c", "trap '' TERM; read -r done || kill -KILL 0")


@contextlib.contextmanager
def ended_with_this_rank() -> Iterator[None]:
    """Watch this process inside the context, if it leads a session, and kill the session when it dies."""
    if os.getsid(0) != os.getpid():
        yield
        return
    watcher = subprocess.Popen(WATCH, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert watcher.stdin is not None
    # the pipe must close with this process, although forked children inherit it
    os.register_at_fork(after_in_child=watcher.stdin.close)
    try:
        yield
    finally:
        watcher.communicate(b"done\n")
