"""Steps, each in a process of its own: a step that fails, crashes or hangs costs its own rows and no others."""

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import NamedTuple

from gpu_check.table import Row, Table

_server = multiprocessing.get_context("forkserver")


class LeftOut(Exception):
    """A step cannot run here; the message says what is missing."""


class Step(NamedTuple):
    """A function from the device's type to rows, and the seconds that it may take.

    environment: variables that must be set before CUDA is initialised
    """

    name: str
    rows: Callable[[str], Iterable[Row]]
    seconds: float
    environment: tuple[tuple[str, str], ...] = ()


def import_torch_once() -> None:
    """Let the server from which the steps are forked import torch; it must not touch CUDA."""
    _server.set_forkserver_preload(["torch"])


def run(steps: Sequence[Step], device: str, table: Table, seconds: float) -> None:
    """Run the steps one after another and add their rows as they come; all together may take these seconds."""
    end = time.monotonic() + seconds
    for step in steps:
        began = time.monotonic()
        limit = min(step.seconds, end - began)
        if limit <= 0:
            table.add(step.name, Row("", {"": "no time was left"}, "left out"))
            continue
        for row in _rows(step, device, limit):
            table.add(step.name, row)
        table.add(step.name, Row("time", {"seconds": time.monotonic() - began}))


def _rows(step: Step, device: str, limit: float) -> Iterator[Row]:
    ours, theirs = _server.Pipe(duplex=False)
    process = _server.Process(target=_child, args=(theirs, step, device))
    process.start()
    theirs.close()
    end = time.monotonic() + limit
    try:
        while ours.poll(max(0.0, end - time.monotonic())):
            if (row := ours.recv()) is None:
                return
            yield row
        yield Row("", {"": f"stopped after {limit:.0f} s"}, "failed")
    except EOFError:
        process.join(10)
        yield Row("", {"": f"the process died, exit code {process.exitcode}"}, "failed")
    finally:
        _end(process)


def _child(pipe: Connection, step: Step, device: str) -> None:
    # a group of its own, so that the step's own processes end with it
    os.setsid()
    os.environ.update(step.environment)
    if device == "cpu":
        import torch

        # several threads wait for each other where other programs run
        torch.set_num_threads(1)
    try:
        for row in step.rows(device):
            pipe.send(row)
    except LeftOut as reason:
        pipe.send(Row("", {"": str(reason)}, "left out"))
    except ImportError as error:
        pipe.send(Row("", {"": f"needs the package {error.name or error}"}, "left out"))
    except Exception as error:
        traceback.print_exc()
        first = next(iter(str(error).splitlines()), "")
        pipe.send(Row("", {"": f"{type(error).__name__}: {first}"}, "failed"))
    pipe.send(None)


def _end(process: multiprocessing.process.BaseProcess) -> None:
    process.join(0.5)
    if process.pid and process.is_alive():
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            process.kill()
    process.join()
