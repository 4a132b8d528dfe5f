"""Start processes of this machine that measure together, each on its own core or GPU."""

import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_cp.bench.comparison import WrongResultError
from megatron_cp.comm import connected

QUIET = 0.97
"""Share of its core that a computing rank gets on a quiet machine; below it, times are not trusted."""


def on_ranks[T](ranks: int, body: Callable[..., T], *args: Any) -> list[T]:
    """Run `body(fabric, device, *args)` on `ranks` new, connected processes; return the results by rank.

    Raises RuntimeError with the text of a rank's ValueError or WrongResultError; all ranks must raise it.
    """
    # the store takes a free port and holds it until the ranks are done
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(ranks, store.port, folder, body, args), nprocs=ranks)
        answers = [pickle.loads(_answer(folder, rank).read_bytes()) for rank in range(ranks)]
    for error in answers:
        if isinstance(error, (ValueError, WrongResultError)):
            raise RuntimeError(str(error))
    return answers


def _rank(rank: int, ranks: int, port: int, folder: str, body: Callable[..., Any], args: tuple[Any, ...]) -> None:
    device = own_device(rank, ranks)
    with printing_to_stderr(), connected(rank, ranks, port, device) as fabric:
        try:
            answer = body(fabric, device, *args)
        except (ValueError, WrongResultError) as error:
            answer = error
        _answer(folder, rank).write_bytes(pickle.dumps(answer))
    # a thread of gloo that has not ended yet aborts the process now and then while its libraries are unloaded
    if mp.parent_process() is not None:
        sys.stderr.flush()
        os._exit(0)


@contextmanager
def printing_to_stderr() -> Iterator[None]:
    """Send what this process and its libraries print to stderr inside the context: stdout belongs to the answer.

    Gloo of torch 2.8 prints a line for each connection, which would stand before the JSON of `bench --json`.
    """
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(stdout, 1)
        os.close(stdout)


def _answer(folder: str, rank: int) -> Path:
    return Path(folder, str(rank))


def own_device(rank: int, ranks: int) -> torch.device:
    """Return the rank's own GPU, or else the CPU, with one thread pinned to its own core if there are enough."""
    if torch.cuda.is_available() and torch.cuda.device_count() >= ranks:
        torch.cuda.set_device(rank)
        return torch.device("cuda", rank)
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= ranks:
        os.sched_setaffinity(0, {cores[rank]})
    return torch.device("cpu")
