"""Run a function on several ranks: each rank is a process forked from one server that has imported torch already.

Importing torch and Megatron costs seconds; the fork server pays it once for the whole test run, and each run still
starts from a clean process, so that nothing of Megatron's global state leaks from one test into the next.
"""

import faulthandler
import io
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["tests.preload"])

TIMEOUT_SECONDS = 300
DIED = "the process died"


def preload(module: str) -> None:
    """Let the server import this module, and what it imports, in the place of `tests.preload`; before the first run."""
    _server.set_forkserver_preload([module])


def _rank_main(
    pipe: Connection, log: str, environment: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.enable(descriptor)  # a rank that dies of a signal writes where it stood
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        _send(pipe, ("ok", function(*args)))
    except BaseException as error:
        _send(pipe, ("error", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
    finally:
        pipe.close()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            try:
                torch.distributed.destroy_process_group()
            except Exception:
                traceback.print_exc()


def _send(pipe: Connection, answer: tuple[str, Any]) -> None:
    """By value: sharing tensors' memory would need this process to outlive the reader."""
    buffer = io.BytesIO()
    torch.save(answer, buffer)
    pipe.send_bytes(buffer.getbuffer())


class RankError(AssertionError):
    """A rank raised; `errors` maps rank to its text, `log` is what all ranks printed."""

    def __init__(self, errors: dict[int, str], log: str) -> None:
        super().__init__(
            "\n".join(f"rank {rank}: {text}" for rank, text in sorted(errors.items())) + f"\n--- log ---\n{log[-6000:]}"
        )
        self.errors = errors
        self.log = log


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT_SECONDS) -> list[Any]:
    """What `function(*args)` returned on each rank; RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set.

    Raises RankError with every rank's error; the other ranks are stopped a few seconds after the first error.
    """
    results, _ = run_ranks_with_log(world_size, function, *args, timeout=timeout)
    return results


def run_ranks_with_log(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT_SECONDS
) -> tuple[list[Any], str]:
    """The same, with what all ranks printed."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        log = os.path.join(folder, "log")
        # the store takes a free port and holds it; the ranks are its clients, as under torchrun
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        ranks = []
        for rank in range(world_size):
            ours, theirs = _server.Pipe(duplex=False)
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": "0",
                "OMP_NUM_THREADS": "1",
                "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            }
            process = _server.Process(target=_rank_main, args=(theirs, log, environment, function, args))
            process.start()
            theirs.close()
            ranks.append((process, ours))
        answers = _collect([pipe for _, pipe in ranks], timeout)
        for process, _ in ranks:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
                process.join()
        with open(log, errors="replace") as file:
            text = file.read()
    errors = {rank: body for rank, (kind, body) in answers.items() if kind == "error"}
    for rank, body in errors.items():
        if body == DIED:
            errors[rank] = f"{DIED} with exit code {ranks[rank][0].exitcode}"
    if errors:
        raise RankError(errors, text)
    return [answers[rank][1] for rank in range(world_size)], text


def _collect(pipes: list[Connection], timeout: float) -> dict[int, tuple[str, Any]]:
    answers: dict[int, tuple[str, Any]] = {}
    waiting = {id(pipe): (rank, pipe) for rank, pipe in enumerate(pipes)}
    deadline = time.monotonic() + timeout
    while waiting:
        ready = wait([pipe for _, pipe in waiting.values()], timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            for rank, _ in waiting.values():
                answers[rank] = ("error", "no answer in time")
            return answers
        for pipe in ready:
            rank, _ = waiting.pop(id(pipe))
            try:
                answers[rank] = torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)
            except EOFError:
                answers[rank] = ("error", DIED)
            if answers[rank][0] == "error":
                # the others may wait for this rank without end
                deadline = min(deadline, time.monotonic() + 5)
    return answers
