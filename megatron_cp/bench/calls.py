"""The kernel calls of a trace, timed on this machine."""

import time

import torch
from torch import Tensor

from megatron_cp.bench.contest import DTYPES
from megatron_cp.context.trace import Compute, Trace
from megatron_cp.kernels import Kernel, choose

ROUNDS = 3


def measure(trace: Trace, kernel: str = "auto") -> dict[Compute, float]:
    """Best seconds of each distinct kernel call of both passes, on one core or one GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problem, passes = trace.problem, (trace.forward, trace.backward)
    chosen, _ = choose(kernel, device=device.type, dtype=problem.dtype, head_dim=problem.head_dim)
    calls = {call: None for run in passes for rank in range(problem.ranks) for call in run.calls(rank)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {call: seconds(call, chosen, device, DTYPES[problem.dtype]) for call in calls}
    finally:
        torch.set_num_threads(threads)


def seconds(call: Compute, kernel: Kernel, device: torch.device, dtype: torch.dtype) -> float:
    """Best seconds of one kernel call, after one that is not counted."""
    q, dout = (_random(call.queries, call.heads, call, device, dtype) for _ in range(2))
    k, v = (_random(call.keys, call.kv_heads, call, device, dtype) for _ in range(2))
    scale = call.head_dim**-0.5
    out, lse = kernel.forward(q, k, v, scale=scale, causal=call.causal)

    def once() -> float:
        began = time.perf_counter()
        if call.backward:
            kernel.backward(dout, q, k, v, out, lse, scale=scale, causal=call.causal)
        else:
            kernel.forward(q, k, v, scale=scale, causal=call.causal)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    once()
    return min(once() for _ in range(ROUNDS))


def _random(tokens: int, heads: int, call: Compute, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(tokens, 1, heads, call.head_dim, device=device, dtype=dtype)
