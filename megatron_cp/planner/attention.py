"""Cost attention of one layer on a cluster: its kernels alone, or the whole context-parallel loop by its trace."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from megatron_cp.context.choose import Cost, Record, continued, parts
from megatron_cp.context.trace.events import Compute, Problem, Trace
from megatron_cp.context.trace.simulate import call_seconds, simulate
from megatron_cp.hardware.cluster import Cluster


class Attention(NamedTuple):
    """One sequence through one layer's attention, on each rank.

    forward, backward: seconds
    live:              most bytes beyond the local q, k, v and dout
    inside, between:   bytes that a rank sends within a node and to other nodes, both passes
    again_inside, again_between: those of the forward, which a recomputation sends again
    """

    forward: Cost
    backward: Cost
    live: float
    inside: float
    between: float
    again_inside: float
    again_between: float


@lru_cache(4096)
def attention(problem: Problem, cluster: Cluster, record: Record | None) -> Attention:
    """Return the cost of `problem`; a pure function with a bounded cache.

    record: makes traces; without it only the loop's kernels are counted, a lower bound of every backend
    Raises ValueError for a problem that the backend refuses.
    """
    if problem.ranks == 1 or record is None:
        return _kernels_alone(problem, cluster)
    numbers = continued(problem, cluster, record, _read)
    return Attention(Cost(*numbers[:3]), Cost(*numbers[3:6]), *numbers[6:])


def _kernels_alone(problem: Problem, cluster: Cluster) -> Attention:
    seen = _share_seen(problem)
    sizes = (problem.seq, problem.seq, problem.heads, problem.kv_heads, problem.head_dim, problem.causal)
    seconds = call_seconds(replace(cluster, call_s=0.0))
    forward, backward = (
        Cost(seen * seconds(Compute(*sizes, backward)) / problem.ranks + cluster.call_s, 0.0, 0.0)
        for backward in (False, True)
    )
    return Attention(forward, backward, 0.0, 0.0, 0.0, 0.0, 0.0)


def _share_seen(problem: Problem) -> float:
    """Return the share of the query-key pairs that a window leaves."""
    whole, (left, right) = problem.seq - 1, problem.window or (None, None)
    before = min(whole, whole if left is None else left)
    after = 0 if problem.causal else min(whole, whole if right is None else right)
    pairs = problem.seq + sum(side * problem.seq - side * (side + 1) // 2 for side in (before, after))
    every = problem.seq + (1 if problem.causal else 2) * (whole * problem.seq - whole * (whole + 1) // 2)
    return pairs / every


def _read(trace: Trace, cluster: Cluster) -> Sequence[float]:
    """The fields of `Attention`, flat."""
    runs = [simulate(run, cluster) for run in (trace.forward, trace.backward)]
    first, both = runs[0].flights, [flight for run in runs for flight in run.flights]
    sent = [
        sum(flight.size for flight in flights if flight.inside is inside) / trace.problem.ranks
        for flights in (both, first)
        for inside in (True, False)
    ]
    live = max(max(run.peak) for run in (trace.forward, trace.backward))
    return [*parts(runs[0]), *parts(runs[1]), live, *sent]
