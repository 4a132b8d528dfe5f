"""Time the kernel calls of a trace on this machine."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from megatron_cp.bench.comparison import DTYPES
from megatron_cp.context.trace.events import Compute, Trace
from megatron_cp.kernels import Kernel, choose

ROUNDS = 3


def measure(*traces: Trace, kernel: str = "auto") -> dict[Compute, float]:
    """Return the median seconds of each distinct kernel call of all passes, on one core or one GPU.

    The calls take turns, so that a slow moment of the machine affects all of them. All traces must have the same dtype
    and head dim.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problem = traces[0].problem
    chosen, _ = choose(kernel, device=device.type, dtype=problem.dtype, head_dim=problem.head_dim)
    passes = [run for trace in traces for run in (trace.forward, trace.backward)]
    found: dict[Compute, list[float]] = {
        call: [] for run in passes for rank in range(len(run.steps)) for call in run.calls(rank)
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(ROUNDS):
            for call, samples in found.items():
                samples.append(seconds(call, chosen, device, DTYPES[problem.dtype], repeats=1))
    finally:
        torch.set_num_threads(threads)
    return {call: median(samples) for call, samples in found.items()}


def seconds(call: Compute, kernel: Kernel, device: torch.device, dtype: torch.dtype, repeats: int = ROUNDS) -> float:
    """Return the best seconds of a kernel call after a warm-up call; a single CPU thread is timed by its own clock."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter
    run = prepared(call, kernel, device, dtype)[call.backward]

    def once() -> float:
        began = clock()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - began

    once()
    return min(once() for _ in range(repeats))


def prepared(
    call: Compute, kernel: Kernel, device: torch.device, dtype: torch.dtype
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return the forward and the backward pass of a kernel call on random inputs of its sizes."""
    q, dout = (_random(call.queries, call.heads, call, device, dtype) for _ in range(2))
    k, v = (_random(call.keys, call.kv_heads, call, device, dtype) for _ in range(2))
    how: dict[str, Any] = {"scale": call.head_dim**-0.5, "causal": call.causal}
    if call.window is not None:
        how["window"] = call.window
    out, lse = kernel.forward(q, k, v, **how)
    return (
        lambda: kernel.forward(q, k, v, **how),
        lambda: kernel.backward(dout, q, k, v, out, lse, **how),
    )


def _random(tokens: int, heads: int, call: Compute, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(tokens, 1, heads, call.head_dim, device=device, dtype=dtype)
