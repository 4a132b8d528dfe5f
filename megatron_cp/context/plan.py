"""The plan of an attention, an algorithm for the ranks of a fabric, and the arguments of its loop."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor

from megatron_cp.comm import Fabric, SingleFabric
from megatron_cp.context import AUTO, BACKENDS, PLACEMENTS, Backend, cache_sizes, layouts
from megatron_cp.context.algorithms.fpdt import FPDT
from megatron_cp.context.checks import able, check_can_chunk, check_grid, check_heads, check_mask, check_placement
from megatron_cp.context.layouts import LAYOUTS, STRIPED, ZIGZAG
from megatron_cp.context.loop import Loop
from megatron_cp.context.masks import Mask, mask
from megatron_cp.context.task import Axes, Task
from megatron_cp.errors import Refused
from megatron_cp.grid import Grid
from megatron_cp.hardware.cluster import Cluster
from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.kernels import Kernel, choose
from megatron_cp.registry import unknown


class Sizes(NamedTuple):
    """The sizes by which `auto` chooses.

    seq:    tokens of the whole sequence
    device: its type
    """

    seq: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    device: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The arguments of an attention except its tensors. Made by `plan`.

    cluster: the cluster for which `auto` chooses; None is looked up by the device
    why:     the reasons of `auto`, in one line
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

    @property
    def loop(self) -> Loop[Any]:
        """The algorithm, cut into chunks over time if the plan says how many."""
        assert self.backend.name != AUTO, "nothing is chosen yet"
        loop = self.backend.load()
        return loop if self.chunks is None or isinstance(loop, FPDT) else FPDT(loop)

    def kernel_for(self, q: Tensor) -> tuple[Kernel, str]:
        """Return the kernel for such queries, and the reason for it."""
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
    layout: str = ZIGZAG,
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
    chunks:        number of chunks over time into which the work is cut, with tokens in host memory (FPDT)
    cluster:       the cluster for which backend "auto" chooses: a name, a file or a description; None: by the device
    stripe:        tokens in a block of layout "striped", the backend's or the tokens' own
    Raises ValueError for an unknown name, a grid that is missing or does not fit, and a choice without effect.
    """
    entry, cp = BACKENDS.get(backend), cp or SingleFabric()
    if layout not in LAYOUTS:
        raise unknown("layout", layout, LAYOUTS)
    if placement not in PLACEMENTS:
        raise unknown("placement", placement, PLACEMENTS)
    check_placement(entry, placement)
    _check_stripe(stripe, entry, layout)
    on_grid = entry.needs_grid or (entry.takes_grid and bool(inner or outer))
    axes = _axes(entry, cp, inner, outer, placement) if on_grid else None
    if chunks is not None and chunks < 1:
        raise Refused(f"chunks is the number of pieces, 1 or more, got {chunks}; leave it out for a whole run")
    if chunks is not None:
        check_can_chunk(entry)
    seen = mask(causal, window)
    check_mask(entry, seen)
    return Plan(
        backend=entry,
        cp=cp,
        axes=axes,
        mask=seen,
        softmax_scale=softmax_scale,
        kernel=kernel,
        deterministic=deterministic,
        layout=layout,
        chunks=chunks,
        cluster=load_cluster(cluster) if isinstance(cluster, str) else cluster,
        stripe=stripe,
    )


def task_for(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Task:
    """Return the arguments of a settled plan's loop for such tensors; raises ValueError when they do not fit."""
    _check(q, k, v)
    grid, axis = (plan.axes.grid, plan.axes.heads) if plan.axes else (None, "")
    check_heads(plan.backend, q.shape[2], plan.cp.size, grid, axis)
    layout = layouts.layout(plan.backend.layout or plan.layout, q.shape[0] * plan.cp.size, plan.cp.size, plan.stripe)
    scale = q.shape[-1] ** -0.5 if plan.softmax_scale is None else plan.softmax_scale
    heads = (q.shape[2], k.shape[2])
    return Task(
        fabric=plan.cp,
        layout=layout,
        mask=plan.mask,
        scale=scale,
        kernel=plan.kernel_for(q)[0],
        heads=heads,
        axes=plan.axes,
        chunks=plan.chunks,
    )


@lru_cache(cache_sizes.LAYOUTS)
def _kernel(name: str, device: str, dtype: str, head_dim: int, deterministic: bool) -> tuple[Kernel, str]:
    return choose(name, device=device, dtype=dtype, head_dim=head_dim, deterministic=deterministic)


def _axes(entry: Backend, cp: Fabric, inner: Fabric | None, outer: Fabric | None, placement: str) -> Axes:
    if inner is None or outer is None:
        raise Refused(
            f"backend {entry.name!r} needs two axes of ranks; "
            "give --hierarchical-context-parallel-sizes INNER OUTER with INNER * OUTER = context_parallel_size"
        )
    if inner.size * outer.size != cp.size:
        raise Refused(f"hierarchical sizes {inner.size} * {outer.size} must be context_parallel_size = {cp.size}")
    grid = Grid(inner.size, outer.size)
    check_grid(entry, grid)
    return Axes(grid, inner, outer, PLACEMENTS[placement])


def _check_stripe(stripe: int, entry: Backend, layout: str) -> None:
    if stripe < 1:
        raise Refused(f"stripe is the number of tokens in a block, 1 or more, got {stripe}")
    if stripe > 1 and STRIPED not in (entry.layout, layout):
        raise Refused(
            f"stripe is the length of a block of layout {STRIPED!r}, got stripe = {stripe} with backend {entry.name!r} "
            f"on layout {layout!r}; use backend {able(lambda other: other.layout == STRIPED)} or leave stripe out"
        )


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if k.shape != v.shape:
        raise Refused(f"k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise Refused(f"q and k must agree in tokens, batch and head dim, got {tuple(q.shape)} and {tuple(k.shape)}")
    if q.shape[2] % k.shape[2]:
        raise Refused(f"query heads must be a multiple of KV heads, got {q.shape[2]} and {k.shape[2]}")
    if not q.dtype == k.dtype == v.dtype:
        raise Refused(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
