"""End the process of a rank that talked through gloo.

A thread of gloo that is still at work while Python unloads its libraries aborts the process now and then, with
"terminate called without an active exception", and torchrun then calls a finished run a failed one.
"""

import atexit
import contextlib
import os
import sys
from collections.abc import Iterator

import torch.distributed as dist

from megatron_cp.comm.distributed import leave_together


@contextlib.contextmanager
def ended_together() -> Iterator[None]:
    """End this process with status 0 once all ranks have come to the end of the context without an error.

    Where gloo does not carry the messages of the ranks, the process goes on after the context.
    """
    try:
        yield
    except SystemExit as end:
        if end.code:
            raise
    if dist.is_initialized() and dist.get_backend() == dist.Backend.GLOO:
        leave_together()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
