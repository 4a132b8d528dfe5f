"""Context-parallel backends against one kernel call over the whole sequence, made by all ranks at the same time."""

import os
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor

from megatron_cp.bench.live import LiveBytes
from megatron_cp.comm import Fabric, connected, largest
from megatron_cp.context import BACKENDS
from megatron_cp.context.attend import Plan, attend, plan
from megatron_cp.context.layouts import indices
from megatron_cp.grid import Grid
from megatron_cp.kernels import choose

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

LARGEST_ERROR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Deviation from the whole kernel call (over its largest value) up to which a backend counts as correct."""


@dataclass(frozen=True)
class Shape:
    """One attention: batch, tokens, query and KV heads, head dim."""

    seq: int
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    batch: int = 1
    causal: bool = True
    dtype: str = "float32"


@dataclass(frozen=True)
class Row:
    """What one backend did at one shape.

    forward, backward: median seconds; share_of_ideal: whole kernel call / ranks / (forward + backward)
    sent:      bytes per rank, forward and backward, the largest over ranks
    peak:      live bytes that the pass adds to the local q, k, v and dout at most, the largest over ranks
    max_error: deviation of out, dq, dk, dv from the whole kernel call, over its largest value
    """

    backend: str
    ranks: int
    seq: int
    forward: float
    backward: float
    share_of_ideal: float
    sent: int
    peak: int
    max_error: float


@dataclass(frozen=True)
class Report:
    """Rows, the kernel, and the share of a core that the ranks got while they did nothing but compute."""

    rows: list[Row]
    kernel: str
    reason: str
    core_share: float

    def as_json(self) -> list[dict[str, Any]]:
        return [asdict(row) for row in self.rows]


def bench(backends: Sequence[str], ranks: int, shapes: Sequence[Shape], rounds: int, kernel: str = "auto") -> Report:
    """Run `ranks` processes of this machine (pinned to cores on a CPU) and measure; contenders take turns.

    Raises RuntimeError when a backend's result differs from the whole kernel call.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    mp.spawn(_rank, args=(ranks, port, list(backends), list(shapes), rounds, kernel, results), nprocs=ranks)
    answer = results.get()
    if isinstance(answer, str):
        raise RuntimeError(answer)
    return answer


def grid_for(ranks: int) -> Grid:
    """The most square grid with the larger axis inside."""
    outer = max(size for size in range(1, int(ranks**0.5) + 1) if ranks % size == 0)
    return Grid(ranks // outer, outer)


class WrongResultError(Exception):
    """A backend differs from the whole kernel call; raised on every rank."""


def _rank(
    rank: int, ranks: int, port: int, backends: list, shapes: list, rounds: int, kernel: str, results: Any
) -> None:
    device = _device(rank, ranks)
    with connected(rank, ranks, port, device) as fabric:
        try:
            answer: Report | str = _report(fabric, device, backends, shapes, rounds, kernel)
        except (ValueError, WrongResultError) as error:
            answer = str(error)
        if rank == 0:
            results.put(answer)


def _device(rank: int, ranks: int) -> torch.device:
    if torch.cuda.is_available() and torch.cuda.device_count() >= ranks:
        torch.cuda.set_device(rank)
        return torch.device("cuda", rank)
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= ranks:
        os.sched_setaffinity(0, {cores[rank]})
    return torch.device("cpu")


def _report(fabric: Fabric, device: torch.device, backends: list, shapes: list, rounds: int, kernel: str) -> Report:
    rows, core_share, chosen = [], 1.0, None
    for shape in shapes:
        contest = Contest(fabric, device, shape, kernel)
        chosen = contest.kernel
        contenders = [Contender(contest, name) for name in backends]
        facts = [contender.check() for contender in contenders]
        for _ in range(rounds):
            for timed in (contest.whole, *contenders):
                timed.time()
        core_share = min(core_share, contest.whole.core_share)
        rows += [contender.row(*fact) for contender, fact in zip(contenders, facts, strict=True)]
    assert chosen is not None, "no shape was asked for"
    return Report(rows, chosen[0].name, chosen[1], core_share)


class Timed:
    """A forward and a backward pass that all ranks start together; the slowest rank counts."""

    def __init__(
        self, fabric: Fabric, device: torch.device, forward: Callable[[], Any], backward: Callable[[Any], Any]
    ) -> None:
        self._fabric, self._device = fabric, device
        self._passes = forward, backward
        self._seconds: tuple[list[float], list[float]] = ([], [])
        self._core_shares: list[float] = []

    def time(self) -> None:
        forward, backward = self._passes
        state = self._once(forward, self._seconds[0])
        self._once(lambda: backward(state), self._seconds[1])

    @property
    def medians(self) -> tuple[float, float]:
        return statistics.median(self._seconds[0]), statistics.median(self._seconds[1])

    @property
    def core_share(self) -> float:
        """Median share of its core that the rank with the smallest share got, as seconds are medians too."""
        return statistics.median(self._core_shares)

    def _once(self, run: Callable[[], Any], seconds: list[float]) -> Any:
        largest(self._fabric, self._device)
        wall, core = time.perf_counter(), time.thread_time()
        result = run()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        wall, core = time.perf_counter() - wall, time.thread_time() - core
        wall_of_slowest, idle = largest(self._fabric, self._device, wall, 1 - core / wall)
        seconds.append(wall_of_slowest)
        self._core_shares.append(1 - idle)
        return result


class Contest:
    """One shape: the same inputs on every rank, and the whole kernel call on them."""

    def __init__(self, fabric: Fabric, device: torch.device, shape: Shape, kernel: str) -> None:
        self.fabric, self.device, self.shape, self.kernel_name = fabric, device, shape, kernel
        self.dtype = DTYPES[shape.dtype]
        self.inputs = _inputs(shape, device)
        self.kernel = choose(kernel, device=device.type, dtype=shape.dtype, head_dim=shape.head_dim)
        scale, causal, (q, k, v, dout) = shape.head_dim**-0.5, shape.causal, self.inputs
        attention = self.kernel[0]
        self.whole = Timed(
            fabric,
            device,
            lambda: attention.forward(q, k, v, scale=scale, causal=causal),
            lambda state: attention.backward(dout, q, k, v, *state, scale=scale, causal=causal),
        )
        out, lse = attention.forward(q, k, v, scale=scale, causal=causal)
        self.expected = (out, *attention.backward(dout, q, k, v, out, lse, scale=scale, causal=causal))


class Contender(Timed):
    """One backend in a contest."""

    def __init__(self, contest: Contest, name: str) -> None:
        super().__init__(contest.fabric, contest.device, self._forward, self._backward)
        self._contest, self._name = contest, name
        self._plan = _plan(contest, name)
        mine = indices("zigzag", contest.shape.seq, contest.fabric.size, contest.fabric.rank)
        self._mine = torch.tensor(mine, device=contest.device)
        q, k, v, self._dout = (tensor[self._mine] for tensor in contest.inputs)
        self._leaves = tuple(tensor.requires_grad_() for tensor in (q, k, v))

    def check(self) -> tuple[int, int, float]:
        """(bytes sent, peak live bytes, deviation), each the largest over ranks; raises when the result is wrong."""
        before = self._plan.sent
        with LiveBytes(*self._leaves, self._dout) as live:
            out = self._forward()
            self._backward(out)
        found = (out, *(leaf.grad for leaf in self._leaves))
        error = max(_deviation(x, whole[self._mine]) for x, whole in zip(found, self._contest.expected, strict=True))
        sent, peak, error = largest(self._fabric, self._device, self._plan.sent - before, live.peak, error)
        if not error <= LARGEST_ERROR[self._contest.dtype]:
            raise WrongResultError(
                f"backend {self._name!r} deviates from the whole kernel call by {error:.1e} at {self._contest.shape}; "
                "no figure of this run can be trusted"
            )
        return int(sent), int(peak), error

    def row(self, sent: int, peak: int, error: float) -> Row:
        ranks, (forward, backward) = self._fabric.size, self.medians
        ideal = sum(self._contest.whole.medians) / ranks
        share = ideal / (forward + backward)
        return Row(self._name, ranks, self._contest.shape.seq, forward, backward, share, sent, peak, error)

    def _forward(self) -> Tensor:
        q, k, v = self._leaves
        return attend(q, k, v, self._plan)

    def _backward(self, out: Tensor) -> None:
        for leaf in self._leaves:
            leaf.grad = None
        out.backward(self._dout)


def _plan(contest: Contest, name: str) -> Plan:
    fabric, inner, outer = contest.fabric, None, None
    if BACKENDS.get(name).needs_grid:
        grid = grid_for(fabric.size)
        inner, outer = (fabric.subset(grid.members(axis, fabric.rank)) for axis in ("inner", "outer"))
    causal, kernel = contest.shape.causal, contest.kernel_name
    return plan(name, cp=fabric, inner=inner, outer=outer, causal=causal, kernel=kernel)


def _inputs(shape: Shape, device: torch.device) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    sizes = [(shape.seq, shape.batch, count, shape.head_dim) for count in heads]
    return tuple(torch.randn(size, generator=generator).to(device, DTYPES[shape.dtype]) for size in sizes)


def _deviation(found: Tensor | None, expected: Tensor) -> float:
    assert found is not None
    found, expected = found.detach().double(), expected.double()
    return ((found - expected).abs().max() / expected.abs().max()).item()
