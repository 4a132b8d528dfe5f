"""Backend `auto`: the loop, the grid's use and the ring's direction that the cost model finds fastest for given sizes.

The choice is a function of sizes and of a cluster's description alone, so that ranks which agree on these agree on it
without a message. It weighs time, for one sequence and both passes, and leaves out what a rank of the cluster has no
memory for.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from threading import Lock

import torch

from megatron_cp.context import AUTO, BACKENDS, DEFAULT, PLACEMENTS, cache_sizes
from megatron_cp.context.choose import BackendChoice, choose
from megatron_cp.context.document_layouts import STREAM
from megatron_cp.context.layouts import layout
from megatron_cp.context.masks import Mask
from megatron_cp.context.plan import Plan, Sizes
from megatron_cp.context.trace.events import Problem, Step
from megatron_cp.context.trace.record import record, record_rank
from megatron_cp.hardware.cluster import Cluster
from megatron_cp.hardware.cluster_file import cluster_of, load_cluster
from megatron_cp.kernels import takes_windows

_one_at_a_time = Lock()


def settle(plan: Plan, sizes: Sizes) -> Plan:
    """Return the plan with the backend, grid and placement that are fastest for such tensors; nothing is sent.

    A plan whose backend is not `auto` comes back as it is.
    Raises ValueError when every backend refuses them and when no cluster is known for the device.
    """
    if plan.backend.name != AUTO:
        return plan
    if plan.cp.size == 1:
        return replace(plan, backend=BACKENDS.get(DEFAULT), axes=None, why="one rank has the whole sequence")
    choice = decide(_problem(plan, sizes), plan.cluster or default_cluster(sizes.device))
    best, axes = choice.problem, None
    if best.grid is not None:
        assert plan.axes is not None, "a grid comes from the plan"
        axes = plan.axes._replace(heads=PLACEMENTS[best.placement])
    return replace(plan, backend=BACKENDS.get(best.backend), axes=axes, why=choice.why)


def choices(plan: Plan, sizes: Sizes) -> tuple[str, ...]:
    """Return what backend `auto` chooses by and each rank finds out by itself, for the comparison of ranks."""
    if plan.backend.name != AUTO or plan.cp.size == 1:
        return ()
    cluster = plan.cluster or default_cluster(sizes.device)
    return f"cluster={cluster.name}", f"windows={_problem(plan, sizes).windows}"


def decide(problem: Problem, cluster: Cluster) -> BackendChoice:
    """Return the fastest choice for the problem, weighed once in a process; the problem's own backend is ignored.

    So are its documents, which change with each microbatch: the choice is the one for a whole sequence.
    """
    # ranks that are threads would all weigh it at the same time
    with _one_at_a_time:
        return _decide(replace(problem, backend=AUTO, documents=None, document_layout=STREAM, cut=False), cluster)


@lru_cache(2)
def default_cluster(device: str) -> Cluster:
    """Return the description that ships for this machine's GPU, or for a CPU."""
    return load_cluster(cluster_of(torch.cuda.get_device_name() if device == "cuda" else None))


@lru_cache(cache_sizes.LAYOUTS)
def _decide(problem: Problem, cluster: Cluster) -> BackendChoice:
    # no backend has such a length or layout
    layout(problem.layout, problem.seq, problem.ranks, problem.stripe)
    # in a thread of its own, because autograd's modes, hooks on saved tensors and autocast belong to the caller's
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_choose, problem, cluster).result()


def _choose(problem: Problem, cluster: Cluster) -> BackendChoice:
    # the search for non-finite values is the only mode of all threads, and tensors without data have none
    with torch.autograd.set_detect_anomaly(torch.is_anomaly_enabled(), check_nan=False):
        return choose(problem, cluster, last_rank, record)


def last_rank(problem: Problem) -> tuple[Step, ...]:
    """Return the steps of the last rank in both passes; raises ValueError for a problem that the backend refuses."""
    forward, backward = record_rank(problem, problem.ranks - 1)
    return *forward, *backward


def _problem(plan: Plan, sizes: Sizes) -> Problem:
    causal, window = _as_window(plan.mask)
    return Problem(
        AUTO,
        plan.cp.size,
        sizes.seq,
        sizes.heads,
        sizes.kv_heads,
        sizes.head_dim,
        causal=causal,
        window=window,
        dtype=sizes.dtype,
        grid=plan.axes.grid if plan.axes else None,
        layout=plan.layout,
        chunks=plan.chunks,
        stripe=plan.stripe,
        device=sizes.device,
        windows=window is not None and takes_windows(plan.kernel_of(sizes.device, sizes.dtype, sizes.head_dim)[0]),
    )


def _as_window(mask: Mask) -> tuple[bool, tuple[int | None, int | None] | None]:
    """Return the two arguments that make the mask."""
    return mask.causal, (mask.left, mask.right) if mask.window else None
