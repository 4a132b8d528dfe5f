"""Context parallelism of eight ranks on one device: one rank after another alone, and all of them as threads."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from gpu_check.kernels import BOUND, dtype_on
from gpu_check.measure import cost, error_of, seconds
from gpu_check.table import Row
from megatron_cp.comm import Done, Fabric, Handle, LocalFabric, SingleFabric, axes_of, in_process
from megatron_cp.context import ALGORITHMS, BACKENDS
from megatron_cp.context.layouts import ZIGZAG, indices
from megatron_cp.context.plan import Plan, plan, task_for
from megatron_cp.context.trace.events import Problem
from megatron_cp.context.trace.record import plan_on, record_rank
from megatron_cp.grid import most_square
from megatron_cp.kernels import Kernel
from megatron_cp.kernels.fused import FusedKernel
from megatron_cp.kernels.reference import ReferenceKernel
from megatron_cp.pipeline.clock import Clock

RANKS = 8
MIB = 2**20


class SilentFabric:
    """A rank whose messages are left out: what it computes is as large as in a run, not as right."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.sent = rank, size, 0

    def exchange(self, sends: Sequence[tuple[Tensor, int]], recvs: Sequence[tuple[Tensor, int]]) -> Handle:
        # a message writes its buffer; what lay there before may be no number, of which kernels make different ones
        for buffer, _ in recvs:
            buffer.zero_()
        return Done()

    def all_gather(self, local: Tensor) -> Tensor:
        return local.new_zeros((self.size, *local.shape))

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        return whole.new_zeros(whole.shape[1:])

    def all_to_all(self, rows: Tensor, sends: Sequence[int], recvs: Sequence[int]) -> Tensor:
        return rows.new_zeros((sum(recvs), *rows.shape[1:]))

    def subset(self, ranks: Sequence[int]) -> "SilentFabric":
        return SilentFabric(list(ranks).index(self.rank), len(ranks))


class TimedKernel:
    """A kernel whose calls are marked on the device's clock."""

    def __init__(self, kernel: Kernel, clock: Clock) -> None:
        self.name, self._kernel, self._clock = kernel.name, kernel, clock
        self._marks: list[tuple[Any, Any]] = []

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        return self._timed(lambda: self._kernel.forward(q, k, v, scale=scale, causal=causal))

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._timed(lambda: self._kernel.backward(dout, q, k, v, out, lse, scale=scale, causal=causal))

    def _timed(self, call: Callable[[], Any]) -> Any:
        begun = self._clock.mark()
        found = call()
        self._marks.append((begun, self._clock.mark()))
        return found

    def begin(self) -> None:
        """Forget the calls so far."""
        self._marks = []

    def taken(self) -> tuple[float, int]:
        """Return the seconds and the number of the calls since `begin`."""
        self._clock.settle()
        return sum(self._clock.seconds(*pair) for pair in self._marks), len(self._marks)


class Shape(NamedTuple):
    """Tokens of the whole sequence, query and KV heads of a rank, head dim; ranks to run; backends."""

    seq: int
    heads: int
    groups: int
    dim: int
    ranks: tuple[int, ...]
    backends: tuple[str, ...]


def shapes(device: str) -> list[Shape]:
    """List shapes, the small ones first; the long ones with the heads of a tensor-parallel rank and fewer ranks."""
    every, some, one = tuple(range(RANKS)), (0, RANKS // 2, RANKS - 1), (RANKS // 2,)
    three = ("zigzag", "all-gather", "ulysses")
    if device != "cuda":
        return [Shape(seq, 8, 8, 16, some, three) for seq in (1024, 2048)]
    return [
        Shape(32768, 32, 8, 128, every, three),
        Shape(32768, 8, 8, 128, every, three),
        Shape(131072, 32, 8, 128, some, three),
        Shape(131072, 8, 8, 128, every, three),
        Shape(1 << 20, 8, 8, 128, some, ("zigzag",)),
        Shape(1 << 20, 8, 8, 128, one, ("all-gather", "ulysses")),
    ]


def rank_plans(device: str) -> Iterator[Row]:
    """Run each rank's forward and backward alone, its messages left out: time, kernel's share, launches, memory."""
    for shape in shapes(device):
        for backend in shape.backends:
            passes = [_rank(device, shape, backend, rank) for rank in shape.ranks]
            for direction, ranks in zip(("forward", "backward"), zip(*passes, strict=True), strict=True):
                slowest = max(ranks, key=lambda figures: figures["ms"])
                heads = f"heads {shape.heads}/{shape.groups}"
                where = f"{len(ranks)} of {RANKS} ranks"
                yield Row(f"{backend}, {shape.seq // 1024}K tokens, {heads}, {direction}, slowest of {where}", slowest)


def _ops(kernel: Kernel, direction: str) -> str:
    """The ops that a kernel chose so far for the shapes of one pass, and for how many of them."""
    lines = kernel.report() if isinstance(kernel, FusedKernel) else []
    chosen = Counter(line.partition(": ")[2].partition(" ")[0].strip(",;") for line in lines if direction in line)
    return " ".join(f"{op} {count}" for op, count in sorted(chosen.items())) or kernel.name


def _rank(device: str, shape: Shape, backend: str, rank: int) -> list[dict[str, Any]]:
    """The figures of one rank's forward and backward."""
    tokens, dtype = shape.seq // RANKS, dtype_on(device)
    generator = torch.Generator(device).manual_seed(rank)
    heads = (shape.heads, shape.groups, shape.groups, shape.heads)
    sizes = ((tokens, 1, count, shape.dim) for count in heads)
    q, k, v, dout = (torch.randn(size, generator=generator, device=device, dtype=dtype) for size in sizes)
    problem = Problem(
        backend,
        RANKS,
        shape.seq,
        shape.heads,
        shape.groups,
        shape.dim,
        dtype=str(dtype).removeprefix("torch."),
        device=device,
    )
    chosen = plan_on(problem, SilentFabric(rank, RANKS), "auto")
    own = chosen.kernel_for(q, v)[0]
    kernel = TimedKernel(own, Clock(torch.device(device)))
    made = plan_on(problem, SilentFabric(rank, RANKS), kernel)
    task, loop = task_for(q, k, v, made), made.loop
    # the first call loads kernels and may choose among them
    _, saved = loop.forward(q, k, v, task)
    loop.backward(dout, saved, task)
    predicted = [max(step.live for step in steps) for steps in record_rank(problem, rank)]
    # the backward pass finds the results of the forward pass in memory
    given = {x.untyped_storage().data_ptr() for x in (q, k, v, dout)}
    kept = [x for x in tree_leaves(saved) if x.untyped_storage().data_ptr() not in given]
    predicted[1] -= sum(x.numel() * x.element_size() for x in kept)
    found: list[dict[str, Any]] = []
    calls = (partial(loop.forward, q, k, v, task), partial(loop.backward, dout, saved, task))
    for direction, call, live in zip(("forward", "backward"), calls, predicted, strict=True):

        def once(call: Callable[[], object] = call) -> None:
            kernel.begin()
            call()

        figures = cost(device, once, q, k, v, dout, *kept)
        in_kernels, count = kernel.taken()
        found.append(
            {
                "ms": figures.seconds * 1e3,
                "ms in kernels": in_kernels * 1e3,
                "host ms": figures.host * 1e3,
                "kernel calls": count,
                "ops": _ops(own, direction),
                "operations": figures.operations,
                "peak MiB": figures.peak / MIB,
                "predicted MiB": live / MIB,
            }
        )
    return found


def in_threads(device: str) -> Iterator[Row]:
    """Run every backend on four ranks, threads that share the device, and compare with the reference in float64."""
    ranks, tokens = 4, (1536 if device == "cuda" else 192)
    generator = torch.Generator(device).manual_seed(0)
    sizes = [(tokens, 1, count, 64) for count in (12, 4, 4, 12)]
    exact = [torch.randn(size, generator=generator, device=device, dtype=torch.float64) for size in sizes]
    for dtype, kernel in ((torch.float64, "reference"), (dtype_on(device), "auto")):
        q, k, v, dout = (x.to(dtype) for x in exact)
        expected = _whole(*(x.double() for x in (q, k, v, dout)))
        bound = 1e-12 if dtype == torch.float64 else BOUND[dtype]
        for backend in ALGORITHMS:
            body = partial(_part, backend=backend, kernel=kernel, inputs=(q, k, v, dout))
            parts = in_process(ranks, body)
            order = torch.cat([mine for mine, _ in parts]).argsort()
            found = [torch.cat(x)[order] for x in zip(*(results for _, results in parts), strict=True)]
            errors = [error_of(a, b) for a, b in zip(found, expected, strict=True)]
            figures = dict(zip(("out", "dq", "dk", "dv"), errors, strict=True))
            name = str(dtype).removeprefix("torch.")
            yield Row(f"{backend}, {name}", figures, "ok" if max(errors) <= bound else "wrong")


def _whole(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    """The reference: out, dq, dk, dv."""
    how: dict[str, Any] = {"scale": q.shape[3] ** -0.5, "causal": True}
    kernel = ReferenceKernel()
    out, lse = kernel.forward(q, k, v, **how)
    return [out, *kernel.backward(dout, q, k, v, out, lse, **how)]


def _part(fabric: LocalFabric, *, backend: str, kernel: str, inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """This rank's tokens and their out, dq, dk, dv, by the loop itself: autograd would run all ranks on one thread."""
    entry = BACKENDS.get(backend)
    axes: dict[str, Fabric] = {}
    if entry.needs_grid:
        axes = dict(zip(("inner", "outer"), axes_of(most_square(fabric.size), fabric), strict=True))
    made = plan(backend, cp=fabric, kernel=kernel, **axes)
    mine = torch.tensor(
        indices(entry.layout or ZIGZAG, len(inputs[0]), fabric.size, fabric.rank), device=inputs[0].device
    )
    q, k, v, dout = (x[mine] for x in inputs)
    return mine, _passes(made, q, k, v, dout)


def _passes(made: Plan, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    task = task_for(q, k, v, made)
    out, saved = made.loop.forward(q, k, v, task)
    return [out, *made.loop.backward(dout, saved, task)]


def chunks(device: str) -> Iterator[Row]:
    """Run attention cut into chunks, which wait in host memory, again and again: equal each time, and how much slower.

    Copies run on streams of their own; an order that is missing would show as a different result in some round. The
    kernel is the reproducible one there, as others add gradients in any order.
    """
    tokens, longer, rounds, dim = (16384, 131072, 20, 128) if device == "cuda" else (512, 512, 3, 64)
    generator = torch.Generator(device).manual_seed(0)
    sizes = [(longer, 1, count, dim) for count in (8, 4, 4, 8)]
    long = [torch.randn(s, generator=generator, device=device, dtype=dtype_on(device)) for s in sizes]
    plans = [plan("zigzag", cp=SingleFabric(), chunks=count, deterministic=True) for count in (None, 8)]
    whole, chunked = (partial(_passes, made, *(x[:tokens] for x in long)) for made in plans)
    expected, first = whole(), chunked()
    errors = [error_of(a, b) for a, b in zip(first, expected, strict=True)]
    bound = 2 * BOUND[dtype_on(device)]
    figures = dict(zip(("out", "dq", "dk", "dv"), errors, strict=True))
    yield Row(f"8 chunks of {tokens} tokens beside the whole", figures, "ok" if max(errors) <= bound else "wrong")
    different = sum(not all(map(torch.equal, chunked(), first)) for _ in range(rounds))
    yield Row(f"{rounds} rounds", {"with other bits": different}, "wrong" if different else "ok")
    fast = [partial(_passes, plan("zigzag", cp=SingleFabric(), chunks=count), *long) for count in (None, 8)]
    one, cut = (seconds(device, call) for call in fast)
    figures = {"whole, ms": one * 1e3, "chunked, ms": cut * 1e3, "chunked / whole": cut / one}
    yield Row(f"time of both passes, {longer} tokens", figures)
