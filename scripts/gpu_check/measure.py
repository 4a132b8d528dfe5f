"""Times, memory and operations of a call on a device."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_cp.context.trace.live import LiveBytes
from megatron_cp.pipeline.clock import Clock


class Cost(NamedTuple):
    """seconds: on the device. host: until the call returned. peak: bytes above what was there. operations: of torch."""

    seconds: float
    host: float
    peak: int
    operations: int


class Operations(TorchDispatchMode):
    """Counts torch's operations that launch something: all but views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view and "empty" not in func.overloadpacket.__name__
        return func(*args, **(kwargs or {}))


def seconds(device: str, call: Callable[[], object], rounds: int = 3) -> float:
    """Return the fastest of some calls after one that warms up."""
    clock, times = Clock(torch.device(device)), []
    call()
    for _ in range(rounds):
        begun = clock.mark()
        call()
        ended = clock.mark()
        clock.settle()
        times.append(clock.seconds(begun, ended))
    return min(times)


def cost(device: str, call: Callable[[], object], *inputs: torch.Tensor) -> Cost:
    """Measure one call of a function that has been called before, its inputs' memory left out."""
    with Operations() as operations, LiveBytes(*inputs) as live:
        call()
    clock = Clock(torch.device(device))
    clock.settle()
    before = 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    wall, begun = time.perf_counter(), clock.mark()
    call()
    ended, host = clock.mark(), time.perf_counter() - wall
    clock.settle()
    peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else live.peak
    return Cost(clock.seconds(begun, ended), host, peak, operations.count)


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative error in the Frobenius norm: the largest element's is a matter of luck."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())
