"""Host time of a backend: what Python and torch take to start a layer's kernels and messages, with none of them run.

One rank runs its own loop with a fabric that sends nothing and a kernel that computes nothing, on tensors so short that
operations on them take no time either. Each kernel call, each message and each launch that merges is counted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import thread_time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_cp.comm import Done, Handle, Message, axes_of
from megatron_cp.context import BACKENDS
from megatron_cp.context.function import run
from megatron_cp.context.merge import accumulator_dtype
from megatron_cp.context.merging import ASSUMED, BY_TORCH, SEVERAL, Merging
from megatron_cp.context.plan import Plan, plan
from megatron_cp.grid import most_square
from megatron_cp.hardware.cluster import Cluster

TOKENS_PER_RANK, HEAD_DIM = 8, 8
WARM_UP, ROUNDS = 3, 15


class Count:
    """Kernel calls, messages and launches that merge partial results so far."""

    def __init__(self) -> None:
        self.calls = self.messages = self.merges = 0

    def merge(self) -> None:
        """Count a launch."""
        self.merges += 1


class SilentFabric:
    """A rank whose messages are counted and not sent: buffers keep what they held; a started collective is one."""

    def __init__(self, count: Count, rank: int, size: int, per_node: int) -> None:
        self.rank, self.size, self.sent, self._count = rank, size, 0, count
        self.nodes = tuple(other // per_node for other in range(size))

    def exchange(self, sends: Sequence[Message], recvs: Sequence[Message]) -> Handle:
        self._count.messages += len(sends)
        return Done()

    def all_gather(self, local: Tensor) -> Tensor:
        self._count.messages += self.size - 1
        return local.new_zeros((self.size, *local.shape))

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        self._count.messages += self.size - 1
        return torch.zeros_like(whole[0])

    def all_to_all(self, rows: Tensor, sends: Sequence[int], recvs: Sequence[int]) -> Tensor:
        self._count.messages += self.size - 1
        return rows.new_zeros((sum(recvs), *rows.shape[1:]))

    def start_all_gather(self, gathered: Tensor, local: Tensor) -> Handle:
        return self._start()

    def start_reduce_scatter(self, part: Tensor, whole: Tensor) -> Handle:
        return self._start()

    def subset(self, ranks: Sequence[int]) -> "SilentFabric":
        return SilentFabric(self._count, list(ranks).index(self.rank), len(ranks), len(ranks))

    def _start(self) -> Handle:
        self._count.messages += 1
        return Done()


class SilentKernel:
    """A kernel whose calls are counted; its results are uninitialized."""

    name = "silent"

    def __init__(self, count: Count) -> None:
        self._count = count

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        self._count.calls += 1
        return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=accumulator_dtype(q))

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        self._count.calls += 1
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class HostPass(NamedTuple):
    """A pass of one layer and microbatch on one rank.

    ms:     of its thread
    merges: launches that merge partial results; where torch merges them, its operations are part of the time
    """

    ms: float
    messages: int
    calls: int
    merges: int


@dataclass(frozen=True, kw_only=True)
class HostTime:
    """Host time of a backend on a grid, or the reason why it refuses the sizes."""

    backend: str
    ranks: int
    grid: str = ""
    forward: HostPass | None = None
    backward: HostPass | None = None
    problem: str = ""


class KernelTime(NamedTuple):
    """Milliseconds of a rank's attention kernels in each pass of one layer and microbatch."""

    forward: float
    backward: float


def kernel_time(cluster: Cluster, seq: int, heads: int, head_dim: int, ranks: int, *, causal: bool) -> KernelTime:
    """Return the time of the whole attention's operations, shared evenly by the ranks."""
    pairs = seq * (seq + 1) // 2 if causal else seq**2
    # two matrix products forward, five backward, of two operations per multiplication
    products = pairs * heads * head_dim * 2 / ranks
    return KernelTime(2e3 * products / cluster.flops_forward, 5e3 * products / cluster.flops_backward)


def merging_on(cluster: Cluster, seq: int, head_dim: int, ranks: int) -> Merging:
    """Return how partial results are merged on the cluster's device: as many wait as of a sequence of this length."""
    if cluster.device != "cuda":
        return BY_TORCH
    return SEVERAL._replace(waiting=SEVERAL.waiting * TOKENS_PER_RANK * HEAD_DIM * ranks // (seq * head_dim))


def host_time(
    backend: str,
    ranks: int,
    heads: int,
    kv_heads: int,
    *,
    causal: bool,
    merging: Merging = SEVERAL,
    per_node: int | None = None,
) -> HostTime:
    """Time the loop of a rank in the middle; the thread's own time, the least of some rounds after a warm-up.

    per_node: ranks of a node; None for all on one
    """
    count = Count()
    assumed = ASSUMED.set(merging._replace(stand_in=count.merge))
    try:
        fabric = SilentFabric(count, ranks // 2, ranks, per_node or ranks)
        return _host_time(backend, fabric, heads, kv_heads, causal, count)
    finally:
        ASSUMED.reset(assumed)


def _host_time(backend: str, fabric: SilentFabric, heads: int, kv_heads: int, causal: bool, count: Count) -> HostTime:
    entry, ranks = BACKENDS.get(backend), fabric.size
    grid = most_square(ranks) if entry.needs_grid else None
    inner, outer = axes_of(grid, fabric) if grid else (None, None)
    shape = (TOKENS_PER_RANK, 1)
    q, k, v, dout = (torch.zeros(*shape, n, HEAD_DIM, dtype=torch.bfloat16) for n in (heads, kv_heads, kv_heads, heads))
    made = plan(backend, cp=fabric, inner=inner, outer=outer, causal=causal, kernel=SilentKernel(count))
    try:
        forward, backward = _passes(made, count, q, k, v, dout)
    except ValueError as refused:
        return HostTime(backend=backend, ranks=ranks, problem=str(refused))
    return HostTime(
        backend=backend,
        ranks=ranks,
        grid=" ".join(map(str, grid.sizes)) if grid else "",
        forward=forward,
        backward=backward,
    )


def _passes(made: Plan, count: Count, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[HostPass, HostPass]:
    for tensor in (q, k, v):
        tensor.requires_grad_()
    rounds = []
    for _ in range(WARM_UP + ROUNDS):
        out, forward = _timed(count, run, q, k, v, made)
        _, backward = _timed(count, torch.autograd.grad, out, (q, k, v), dout)
        rounds.append((forward, backward))
    kept = zip(*rounds[WARM_UP:], strict=True)
    forward, backward = (passes[0]._replace(ms=min(one.ms for one in passes)) for passes in kept)
    return forward, backward


def _timed(count: Count, body: Callable[..., Any], *arguments: Any) -> tuple[Any, HostPass]:
    count.calls = count.messages = count.merges = 0
    start = thread_time()
    result = body(*arguments)
    return result, HostPass((thread_time() - start) * 1e3, count.messages, count.calls, count.merges)
