"""Attention over a sequence sharded on ranks: one autograd function around every backend."""

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_cp.comm import Fabric, SingleFabric, values_of_all
from megatron_cp.context import AUTO, BACKENDS, PLACEMENTS, Backend
from megatron_cp.context.layouts import LAYOUTS, Layout
from megatron_cp.context.layouts import layout as positions
from megatron_cp.context.masks import Mask, mask
from megatron_cp.context.relayout import relayout
from megatron_cp.context.task import Axes, Chunks, Task
from megatron_cp.grid import Grid
from megatron_cp.kernels import Kernel, choose
from megatron_cp.planner.hardware import Cluster, load_cluster
from megatron_cp.registry import suggest

CHUNKED = "megatron_cp.context.fpdt"
"""The loop that cuts any backend's work into chunks over time."""


class Sizes(NamedTuple):
    """What `auto` must know of the tensors.

    seq:    tokens of the whole sequence
    device: its type
    """

    seq: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    device: str


@dataclass(frozen=True)
class Plan:
    """How to attend: everything but the tensors. Made by `plan`.

    cluster: what `auto` weighs its choice for; None is looked up by the device
    why:     the reasons of `auto`, in one line
    met:     the shape of the first call, on which the ranks have agreed; empty before it
    """

    backend: Backend
    cp: Fabric
    axes: Axes | None
    mask: Mask
    softmax_scale: float | None
    kernel: str | Kernel
    deterministic: bool
    layout: str
    chunks: int | None = None
    cluster: Cluster | None = None
    why: str = ""
    stripe: int = 1
    met: list[tuple[int, ...]] = field(default_factory=list, compare=False)

    @property
    def loop(self) -> ModuleType:
        """The module whose `forward` and `backward` do it."""
        assert self.backend.name != AUTO, "nothing is chosen yet"
        return import_module(CHUNKED if self.chunks is not None else self.backend.module)

    def settled(self, sizes: Sizes) -> "Plan":
        """The same plan with the backend that `auto` chooses for such tensors; any other plan is settled."""
        if self.backend.name != AUTO:
            return self
        return import_module(self.backend.module).settle(self, sizes)

    def kernel_for(self, q: Tensor) -> tuple[Kernel, str]:
        """The kernel that such queries get, and why."""
        if not isinstance(self.kernel, str):
            return self.kernel, f"{self.kernel.name!r} was handed in"
        return _kernel(self.kernel, q.device.type, str(q.dtype).removeprefix("torch."), q.shape[-1], self.deterministic)

    @property
    def sent(self) -> int:
        """Bytes that this rank has sent so far over this plan's fabrics."""
        fabrics = [self.cp, *((self.axes.inner, self.axes.outer) if self.axes else ())]
        return sum(fabric.sent for fabric in fabrics)


def plan(
    backend: str,
    *,
    cp: Fabric | None = None,
    inner: Fabric | None = None,
    outer: Fabric | None = None,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    softmax_scale: float | None = None,
    kernel: str | Kernel = "auto",
    placement: str = "head-first",
    deterministic: bool = False,
    layout: str = "zigzag",
    chunks: int | None = None,
    cluster: str | Cluster | None = None,
    stripe: int = 1,
) -> Plan:
    """Choose an algorithm for the ranks of `cp`; communicates nothing.

    inner, outer:  the two axes of the ranks, for backends on a grid
    window:        (left, right) keys that a query sees beside its own position; None or -1 is no limit
    softmax_scale: None means 1 / sqrt(d)
    placement:     "head-first": the inner axis exchanges heads; "context-first": the outer one
    layout:        which positions each rank's tokens have: "zigzag" as Megatron cuts them, "contiguous" or "striped"
    chunks:        cut the backend's work into so many pieces over time, what waits lies in host memory (FPDT)
    cluster:       what backend "auto" weighs its choice for: a name, a file or a description, by default by the device
    stripe:        tokens in a block of layout "striped", the backend's or the tokens' own
    Raises ValueError for an unknown name, for a grid that is missing or does not fit, and for what has no effect.
    """
    entry, cp = BACKENDS.get(backend), cp or SingleFabric()
    _known("layout", layout, LAYOUTS)
    _known("placement", placement, PLACEMENTS)
    entry.check_placement(placement)
    _check_stripe(stripe, entry, layout)
    on_grid = entry.needs_grid or (entry.takes_grid and bool(inner or outer))
    axes = _axes(entry, cp, inner, outer, placement) if on_grid else None
    if chunks is not None and chunks < 1:
        raise ValueError(f"chunks is the number of pieces, 1 or more, got {chunks}; leave it out for a whole run")
    if chunks is not None and not entry.chunks:
        raise ValueError(
            f"backend {entry.name!r} cannot be cut into chunks; leave chunks out or use 'fpdt' or 'zigzag'"
        )
    hardware = load_cluster(cluster) if isinstance(cluster, str) else cluster
    seen = mask(causal, window)
    return Plan(entry, cp, axes, seen, softmax_scale, kernel, deterministic, layout, chunks, hardware, stripe=stripe)


def attend(
    q: Float[Tensor, "s b h d"], k: Float[Tensor, "s b g d"], v: Float[Tensor, "s b g d"], plan: Plan
) -> Float[Tensor, "s b h d"]:
    """Attention of this rank's queries over the whole sequence, differentiable; all ranks of the plan call it together.

    Raises ValueError when lengths or heads do not fit the algorithm or differ between ranks, before anything else is
    sent.
    """
    if not plan.met:
        _agree(q, k, plan.cp)
        plan.met.append(tuple(q.shape))
    plan = plan.settled(_sizes(q, k, plan))
    outside = positions(plan.layout, q.shape[0] * plan.cp.size, plan.cp.size, plan.stripe)
    return _Attend.apply(q, k, v, plan.loop, task_for(q, k, v, plan), outside)


def task_for(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Task:
    """What a settled plan's loop is given for such tensors; raises ValueError when they do not fit."""
    _check(q, k, v)
    runs = positions(plan.backend.layout or plan.layout, q.shape[0] * plan.cp.size, plan.cp.size, plan.stripe)
    scale = q.shape[-1] ** -0.5 if plan.softmax_scale is None else plan.softmax_scale
    inside, heads = import_module(plan.backend.module), (q.shape[2], k.shape[2])
    chunks = None if plan.chunks is None else Chunks(plan.chunks, None if inside is plan.loop else inside)
    return Task(plan.cp, runs, plan.mask, scale, plan.kernel_for(q)[0], heads, plan.axes, chunks)


class _Attend(torch.autograd.Function):
    """A backend's loop, between a re-layout in and one out where it wants other positions than the tokens have."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, loop: ModuleType, task: Task, outside: Layout) -> Tensor:
        q, k, v = relayout([q, k, v], outside, task.runs, task.fabric)
        out, saved = loop.forward(q, k, v, task)
        ctx.save_for_backward(*saved)
        ctx.loop, ctx.task, ctx.outside = loop, task, outside
        # a backend with a number of tensors of its own saves a bare tuple
        ctx.remake = getattr(saved, "_make", tuple)
        return relayout([out], task.runs, outside, task.fabric)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        task, outside = ctx.task, ctx.outside
        (dout,) = relayout([dout], outside, task.runs, task.fabric)
        grads = ctx.loop.backward(dout, ctx.remake(ctx.saved_tensors), task)
        return *relayout(grads, task.runs, outside, task.fabric), None, None, None


@cache
def _kernel(name: str, device: str, dtype: str, head_dim: int, deterministic: bool) -> tuple[Kernel, str]:
    return choose(name, device=device, dtype=dtype, head_dim=head_dim, deterministic=deterministic)


def _axes(entry: Backend, cp: Fabric, inner: Fabric | None, outer: Fabric | None, placement: str) -> Axes:
    if inner is None or outer is None:
        raise ValueError(
            f"backend {entry.name!r} needs two axes of ranks; "
            "give --hierarchical-context-parallel-sizes INNER OUTER with INNER * OUTER = context_parallel_size"
        )
    if inner.size * outer.size != cp.size:
        raise ValueError(f"hierarchical sizes {inner.size} * {outer.size} must be context_parallel_size = {cp.size}")
    grid = Grid(inner.size, outer.size)
    entry.check_grid(grid)
    return Axes(grid, inner, outer, PLACEMENTS[placement])


def _check_stripe(stripe: int, entry: Backend, layout: str) -> None:
    if stripe < 1:
        raise ValueError(f"stripe is the number of tokens in a block, 1 or more, got {stripe}")
    if stripe > 1 and "striped" not in (entry.layout, layout):
        raise ValueError(
            f"stripe is the length of a block of layout 'striped', got stripe = {stripe} with backend {entry.name!r} "
            f"on layout {layout!r}; use backend 'striped' or leave stripe out"
        )


def _known(kind: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise ValueError(f"unknown {kind} {name!r}{suggest(name, known)}; known: {', '.join(known)}")


def _sizes(q: Tensor, k: Tensor, plan: Plan) -> Sizes:
    dtype = str(q.dtype).removeprefix("torch.")
    return Sizes(q.shape[0] * plan.cp.size, q.shape[2], k.shape[2], q.shape[3], dtype, q.device.type)


def _agree(q: Tensor, k: Tensor, cp: Fabric) -> None:
    """Ranks with different shapes would wait for each other for ever; found once, by all, at a plan's first use."""
    if cp.size == 1:
        return
    shapes = values_of_all(cp, q.device, (*q.shape, k.shape[2]))
    if len(set(shapes)) > 1:
        each = ", ".join(f"rank {rank}: {shape[0]}" for rank, shape in enumerate(shapes))
        if len({shape[0] for shape in shapes}) > 1:
            raise ValueError(
                f"all ranks must hold equally many tokens, got {each}; pad the sequence to a common length"
            )
        raise ValueError(f"all ranks must hold q and k of one shape, got (s, b, h, d, g) {shapes}")


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must agree in tokens, batch and head dim, got {tuple(q.shape)} and {tuple(k.shape)}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"query heads must be a multiple of KV heads, got {q.shape[2]} and {k.shape[2]}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
