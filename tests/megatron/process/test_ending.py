"""Ranks that talked through gloo end before Python unloads its library, and lose nothing on the way."""

import atexit
import os
import sys

import pytest
import torch.distributed as dist

from megatron_cp.megatron.process.ending import ended_together
from tests.ranks import run_ranks


def ending(end: str) -> tuple[int, str]:
    """Fork a process that ends with `end`; return its exit status and what it and its callbacks at exit printed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writer, 1)
        # what a process that comes out of the context ends with here; only then does Python unload what it loaded
        try:
            leave(end)
        finally:
            os._exit(9)
    os.close(writer)
    with os.fdopen(reader) as printed:
        text = printed.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


def leave(end: str) -> None:
    sys.stdout = os.fdopen(1, "w")
    # callbacks of the parent are not this process's
    atexit._clear()
    atexit.register(print, "callback")
    with ended_together():
        if end != "no group":
            dist.init_process_group("gloo")
        print("trained", end=" ")
        if end == "error":
            raise ValueError
        if end.startswith("exit"):
            sys.exit(int(end[-1]))


@pytest.mark.parametrize(
    ("end", "status", "printed"),
    [
        ("trained", 0, "trained callback\n"),
        ("exit 0", 0, "trained callback\n"),
        *((end, 9, "") for end in ("exit 1", "error", "no group")),
    ],
)
def test_a_rank_ends_well_or_goes_on(end: str, status: int, printed: str) -> None:
    assert run_ranks(1, ending, end) == [(status, printed)]
