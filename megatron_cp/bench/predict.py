"""Predict the times of backends from their traces, with kernel calls timed in the same rounds as the backends.

The simulator is the one of `megatron-cp trace`. Its inputs are measured in the same run, so that a drift of the
machine's speed is not counted as an error of the model.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_cp.bench.comparison import BackendResult, Comparison, TimedPasses
from megatron_cp.bench.links import link_here, touch_here
from megatron_cp.context import AUTO, BACKENDS
from megatron_cp.context.layouts import ZIGZAG
from megatron_cp.context.trace.events import Compute, Problem, Trace
from megatron_cp.context.trace.record import record
from megatron_cp.context.trace.simulate import simulate
from megatron_cp.grid import most_square
from megatron_cp.hardware.cluster import Cluster


class Forecast:
    """Traces of backends at the comparison's shape, and their kernel calls, timed once in every round."""

    def __init__(self, comparison: Comparison, backends: Sequence[str], native: bool) -> None:
        self._comparison = comparison
        self._traces = {name: record(_problem(comparison, name, native)) for name in backends if name != AUTO}
        # sorted: all ranks make the same call at the same time, as they do in the passes
        calls = sorted({call._replace(backward=False) for trace in self._traces.values() for call in _calls(trace)})
        self._timed = {call: self._tile(call) for call in calls}
        self._link, self._touch = (
            link_here(comparison.fabric, comparison.device),
            touch_here(comparison.fabric, comparison.device),
        )

    def time(self) -> None:
        """Make every kernel call once, on all ranks."""
        for tile in self._timed.values():
            tile.time()

    def predicted(self, row: BackendResult) -> tuple[float, float] | None:
        """Return the seconds of forward and backward, or the row's own prediction without a trace of this shape."""
        if row.backend not in self._traces or row.seq != self._comparison.shape.seq:
            return row.predicted
        trace, cluster = self._traces[row.backend], self._cluster()
        forward, backward = (simulate(run, cluster, self._seconds).time for run in (trace.forward, trace.backward))
        return forward, backward

    def _seconds(self, call: Compute) -> float:
        return self._timed[call._replace(backward=False)].medians[call.backward]

    def _tile(self, call: Compute) -> TimedPasses:
        kernel, scale, causal = self._comparison.kernel[0], call.head_dim**-0.5, call.causal
        q, dout = (self._random(call.queries, call.heads) for _ in range(2))
        k, v = (self._random(call.keys, call.kv_heads) for _ in range(2))
        return TimedPasses(
            self._comparison.fabric,
            self._comparison.device,
            lambda: kernel.forward(q, k, v, scale=scale, causal=causal),
            lambda state: kernel.backward(dout, q, k, v, *state, scale=scale, causal=causal),
        )

    def _random(self, tokens: int, heads: int) -> Tensor:
        shape = (tokens, 1, heads, self._comparison.shape.head_dim)
        return torch.randn(shape, device=self._comparison.device).to(self._comparison.dtype)

    def _cluster(self) -> Cluster:
        """Describe this machine; matrix products outside kernel calls (rsa's) run at the rate of the whole call."""
        shape, (forward, backward) = self._comparison.shape, self._comparison.whole.medians
        flops = shape.head_dim * Compute(shape.seq, shape.seq, shape.heads, 0, 0, shape.causal, False).work
        return Cluster(
            name="this machine",
            dtype=shape.dtype,
            flops_forward=4 * flops / forward,
            flops_backward=10 * flops / backward,
            call_s=0.0,
            touch_bytes_per_s=self._touch,
            host_bytes_per_s=None,
            ranks_per_node=2**30,
            inside=self._link,
            between=None,
        )


def _problem(comparison: Comparison, name: str, native: bool) -> Problem:
    shape, ranks, backend = comparison.shape, comparison.fabric.size, BACKENDS.get(name)
    return Problem(
        backend=name,
        ranks=ranks,
        seq=shape.seq,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        causal=shape.causal,
        dtype=shape.dtype,
        grid=most_square(ranks) if backend.needs_grid else None,
        layout=(backend.layout if native else None) or ZIGZAG,
    )


def _calls(trace: Trace) -> Iterator[Compute]:
    for run in (trace.forward, trace.backward):
        for rank in range(trace.problem.ranks):
            yield from run.calls(rank)
