"""The plan of an attention, an algorithm for the ranks of a fabric, and the arguments of its loop."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from hashlib import blake2b
from itertools import count
from numbers import Real
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from megatron_cp.comm import Fabric, Gathering, fabric_of
from megatron_cp.context import AUTO, BACKENDS, PLACEMENTS, Backend, cache_sizes, layouts
from megatron_cp.context.algorithms.fpdt import FPDT
from megatron_cp.context.alibi import COLUMNS as ALIBI_COLUMNS
from megatron_cp.context.alibi import as_slopes
from megatron_cp.context.checks import (
    able,
    check_can_chunk,
    check_document_layout,
    check_dropout,
    check_grid,
    check_heads,
    check_mask,
    check_placement,
    check_softcap,
)
from megatron_cp.context.document_layouts import AUTO as AUTO_LAYOUT
from megatron_cp.context.document_layouts import NAMES as DOCUMENT_LAYOUT_NAMES
from megatron_cp.context.document_layouts import STREAM
from megatron_cp.context.documents import Documents
from megatron_cp.context.dropout import as_rate
from megatron_cp.context.inputs import check_inputs
from megatron_cp.context.layouts import LAYOUTS, STRIPED, ZIGZAG, Layout
from megatron_cp.context.loop import Loop
from megatron_cp.context.masks import Mask, mask
from megatron_cp.context.task import Axes, Task
from megatron_cp.errors import Refused, shown
from megatron_cp.grid import Grid
from megatron_cp.hardware.cluster import Cluster
from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.kernels import AUTO as AUTO_KERNEL
from megatron_cp.kernels import KERNELS, Kernel, check_caps, check_drops, choose, with_cap
from megatron_cp.registry import unknown

LARGEST_SCALE = 3.4e38
"""The largest number of float32, in which kernels take the scale."""

_numbers = count()
_made: "WeakValueDictionary[int, Plan]" = WeakValueDictionary()


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
    """The arguments of an attention except its tensors. Made by `plan`. Copies are the plan itself.

    cluster: the cluster for which `auto` chooses; None is looked up by the device
    why:     the reasons of `auto`, in one line
    softcap: where the kernel caps scores
    dropout: part of the weights that is dropped in calls with a seed
    alibi:   the slope of each query head
    document_layout: which positions the loop works on for packed documents
    number:  of this plan among all of the process, for graphs that hold no objects
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
    softcap: float | None = None
    document_layout: str = STREAM
    dropout: float = 0.0
    alibi: tuple[float, ...] | None = None
    number: int = field(init=False, repr=False, compare=False, default_factory=lambda: next(_numbers))

    def __post_init__(self) -> None:
        _made[self.number] = self

    def __copy__(self) -> "Plan":
        return self

    def __deepcopy__(self, _: object) -> "Plan":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # the number is of this process
        return _again, ({each.name: getattr(self, each.name) for each in fields(self) if each.init},)

    @property
    def terms(self) -> tuple[object, ...]:
        """The part of the plan that is the same on every rank."""
        grid = (self.axes.grid, self.axes.heads) if self.axes else None
        nodes = self.cp.nodes if self.backend.capabilities.by_nodes and isinstance(self.cp, Gathering) else ()
        return (
            self.backend.name,
            self.mask,
            f"softmax_scale={self.softmax_scale}",
            f"layout={self.layout}",
            f"stripe={self.stripe}",
            f"chunks={self.chunks}",
            f"softcap={self.softcap}",
            f"document_layout={self.document_layout}",
            f"dropout={self.dropout}",
            f"alibi={self.alibi and _word_of(self.alibi)}",
            f"grid={grid}",
            f"cluster={self.cluster and self.cluster.name}",
            *([f"nodes={len({*nodes})} with {nodes.count(nodes[0])} ranks on the first"] if nodes else []),
        )

    @property
    def loop(self) -> Loop[Any]:
        """The algorithm, cut into chunks over time if the plan says how many."""
        assert self.backend.name != AUTO, "nothing is chosen yet"
        loop = self.backend.load()
        return loop if self.chunks is None or isinstance(loop, FPDT) else FPDT(loop)

    def kernel_for(self, q: Tensor, v: Tensor) -> tuple[Kernel, str]:
        """Return the kernel for such queries and values, and the reason for it."""
        head_dim = max(q.shape[-1] + (ALIBI_COLUMNS if self.alibi else 0), v.shape[-1])
        return self.kernel_of(q.device.type, str(q.dtype).removeprefix("torch."), head_dim)

    def kernel_of(self, device: str, dtype: str, head_dim: int) -> tuple[Kernel, str]:
        """Return the kernel for tensors on such a device, and the reason for it."""
        if not isinstance(self.kernel, str):
            return with_cap(self.kernel, self.softcap), f"{self.kernel.name!r} was handed in"
        drops = self.dropout > 0
        return _kernel(self.kernel, device, dtype, head_dim, self.deterministic, self.softcap, drops)

    @property
    def sent(self) -> int:
        """Bytes that this rank has sent so far over this plan's fabrics."""
        fabrics = [self.cp, *((self.axes.inner, self.axes.outer) if self.axes else ())]
        return sum(fabric.sent for fabric in fabrics)


def plan(
    backend: str,
    *,
    cp: Fabric | ProcessGroup | DeviceMesh | None = None,
    inner: Fabric | ProcessGroup | DeviceMesh | None = None,
    outer: Fabric | ProcessGroup | DeviceMesh | None = None,
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
    softcap: float | None = None,
    document_layout: str = STREAM,
    dropout: float = 0.0,
    alibi: Sequence[float] | Tensor | None = None,
) -> Plan:
    """Choose an algorithm for the ranks of `cp`; communicates nothing.

    cp:            a process group, a DeviceMesh of one dim, or a fabric; left out in a process alone
    inner, outer:  the two axes of the ranks, for backends on a grid
    window:        (left, right) keys that a query sees beside its own position; None or -1 is no limit
    softmax_scale: None means 1 / sqrt(d)
    placement:     "head-first": the inner axis exchanges heads; "context-first": the outer one
    layout:        which positions each rank's tokens have: "zigzag" as Megatron cuts them, "contiguous" or "striped"
    chunks:        number of chunks over time into which the work is cut, with tokens in host memory (FPDT)
    cluster:       the cluster for which backend "auto" chooses: a name, a file or a description; None: by the device
    stripe:        tokens in a block of layout "striped", the backend's or the tokens' own
    softcap:       softcap tanh(score / softcap) takes the place of each scaled score; None leaves scores as they are
    document_layout: for packed documents, the tokens of each rank inside attention: "stream" as `layout` says,
                   "document" zigzag over each document, "blocks" of equal work, "auto" stream or blocks, whichever
                   is faster by prediction; tokens move there and back
    dropout:       part of the attention weights that is dropped, in calls that bring a seed
    alibi:         slope * (key - query), in positions, is added to each scaled score: a slope for each query head of
                   this rank's tensors, of `alibi_slopes`
    Raises ValueError for an unknown name, a grid that is missing or does not fit, and a choice without effect.
    """
    cp = fabric_of(cp)
    inner = None if inner is None else fabric_of(inner, "inner")
    outer = None if outer is None else fabric_of(outer, "outer")
    softmax_scale = None if softmax_scale is None else _as_scale(softmax_scale)
    _check_types(causal=causal, deterministic=deterministic, kernel=kernel, chunks=chunks, stripe=stripe)
    entry = BACKENDS.get(backend)
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
    if softcap is not None:
        softcap = _as_softcap(softcap)
        check_softcap(entry)
        check_caps(kernel)
    dropout = as_rate(dropout)
    if dropout:
        check_dropout(entry)
        check_drops(kernel)
    if document_layout not in DOCUMENT_LAYOUT_NAMES:
        raise unknown("document layout", document_layout, DOCUMENT_LAYOUT_NAMES)
    if document_layout not in (STREAM, AUTO_LAYOUT):
        check_document_layout(entry, document_layout, chunks)
    seen = mask(causal, window)
    check_mask(entry, seen)
    slopes = as_slopes(alibi)
    if slopes is not None and seen.right != 0:
        raise Refused("alibi needs causal attention, where distances have one sign; leave it out, or causal=False")
    if slopes is not None and softcap is not None:
        raise Refused("alibi is added to scores that softcap does not cap; leave one of the two out")
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
        softcap=softcap,
        document_layout=document_layout,
        dropout=dropout,
        alibi=slopes,
    )


def check_plan(plan: object) -> None:
    """Raise Refused for anything but a plan."""
    if not isinstance(plan, Plan):
        raise Refused(f"plan must be made by megatron_cp.plan(backend, ...), got {shown(plan)}")


def layouts_for(plan: Plan, tokens: int, packed: Documents | None = None) -> tuple[Layout, Layout]:
    """Return the positions of the tokens that the ranks of a settled plan hold, and of those that its loop works on."""

    def named(name: str) -> Layout:
        try:
            return layouts.layout(name, tokens, plan.cp.size, plan.stripe)
        except Refused as refused:
            raise Refused(f"{refused}; the first dim of q, k and v is the tokens of a rank (s b h d)") from None

    cut = None if packed is None else packed.layout
    held = named(plan.layout) if cut is None else cut
    if plan.backend.layout is not None:
        return held, named(plan.backend.layout)
    # chunks over time are cut from equal pieces
    if cut is not None and (plan.chunks is not None or not plan.backend.capabilities.any_positions):
        return held, named(plan.layout)
    if cut is not None or packed is None or plan.document_layout == STREAM:
        return held, held
    return held, packed.planned(plan.document_layout, plan.cp.size, plan.mask)


def task_for(q: Tensor, k: Tensor, v: Tensor, plan: Plan, packed: Documents | None = None) -> Task:
    """Return the arguments of a settled plan's loop for tensors and documents; raises ValueError if they do not fit."""
    check_inputs(q, k, v)
    grid, axis = (plan.axes.grid, plan.axes.heads) if plan.axes else (None, "")
    check_heads(plan.backend, q.shape[2], plan.cp.size, grid, axis)
    _, layout = layouts_for(plan, q.shape[0] * plan.cp.size, packed)
    scale = q.shape[-1] ** -0.5 if plan.softmax_scale is None else plan.softmax_scale
    heads = (q.shape[2], k.shape[2])
    return Task(
        fabric=plan.cp,
        layout=layout,
        mask=plan.mask if packed is None else packed.mask(plan.mask),
        scale=scale,
        kernel=plan.kernel_for(q, v)[0],
        heads=heads,
        axes=plan.axes,
        chunks=plan.chunks,
    )


@lru_cache(cache_sizes.LAYOUTS)
def _kernel(
    name: str, device: str, dtype: str, head_dim: int, deterministic: bool, softcap: float | None, drops: bool
) -> tuple[Kernel, str]:
    return choose(
        name,
        device=device,
        dtype=dtype,
        head_dim=head_dim,
        deterministic=deterministic,
        softcap=softcap,
        drops=drops,
    )


def _axes(entry: Backend, cp: Fabric, inner: Fabric | None, outer: Fabric | None, placement: str) -> Axes:
    if inner is None or outer is None:
        raise Refused(
            f"backend {entry.name!r} needs two axes of ranks; "
            f"give inner= and outer=, as axes_of(Grid(INNER, OUTER), cp) makes them of the {cp.size} ranks of cp"
        )
    if inner.size * outer.size != cp.size:
        raise Refused(f"inner of {inner.size} and outer of {outer.size} ranks must make the {cp.size} ranks of cp")
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


def _word_of(slopes: tuple[float, ...]) -> str:
    """Return a short word for the slopes of many heads, by which ranks compare them."""
    return f"{len(slopes)} slopes {blake2b(repr(slopes).encode(), digest_size=8).hexdigest()}"


def numbered(number: int) -> Plan:
    """Return the plan of this number; raises ValueError when the plan is gone."""
    made = _made.get(number)
    if made is None:
        raise Refused(f"plan {number} of a compiled graph is gone; keep the plan for as long as the graph is called")
    return made


def _again(arguments: dict[str, Any]) -> Plan:
    return Plan(**arguments)


def _as_scale(scale: object) -> float:
    # a tensor would get no gradient
    if not isinstance(scale, Real) or isinstance(scale, bool):
        got = f"a {type(scale).__name__}" if isinstance(scale, Tensor) else repr(scale)
        raise Refused(
            f"softmax_scale must be a float, got {got}; "
            "multiply q by a scale that is learned or differs between heads, and give softmax_scale=1.0"
        )
    try:
        value = float(scale)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value) or abs(value) > LARGEST_SCALE:
        raise Refused(f"softmax_scale must be finite in float32, got {value}; leave it out for 1 / sqrt(head dim)")
    return value


def _as_softcap(softcap: object) -> float:
    if not isinstance(softcap, Real) or isinstance(softcap, bool) or not 0 < float(softcap) <= LARGEST_SCALE:
        raise Refused(
            f"softcap must be a positive finite number, got {shown(softcap)}; leave it out for scores as they are"
        )
    return float(softcap)


def _check_types(*, causal: object, deterministic: object, kernel: object, chunks: object, stripe: object) -> None:
    for name, value in (("causal", causal), ("deterministic", deterministic)):
        if not isinstance(value, bool):
            raise Refused(f"{name} must be True or False, got {shown(value)}")
    for name, value in (("chunks", chunks), ("stripe", stripe)):
        if value is not None and type(value) is not int:
            raise Refused(f"{name} must be a whole number, got {shown(value)}")
    if isinstance(kernel, str) and kernel != AUTO_KERNEL:
        KERNELS.get(kernel)
    elif not isinstance(kernel, str | Kernel):
        raise Refused(
            f"kernel must be a name or a Kernel, got {shown(kernel)}; use one of: auto, {', '.join(KERNELS.names)}"
        )
