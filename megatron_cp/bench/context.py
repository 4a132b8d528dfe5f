"""Time context-parallel backends beside one kernel call over the whole sequence, made by all ranks at the same time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import psutil
import torch

from megatron_cp.bench.comparison import (
    WHOLE,
    AttentionShape,
    BackendResult,
    Candidate,
    Comparison,
    Implementation,
    RefusedError,
    TimedPasses,
    sends_nothing,
)
from megatron_cp.bench.pairs import Pair, pairs_of
from megatron_cp.bench.peers import Peer, counted, installed, load
from megatron_cp.bench.predict import Forecast
from megatron_cp.bench.processes import QUIET, on_ranks
from megatron_cp.comm import Fabric, axes_of
from megatron_cp.context import AUTO, BACKENDS
from megatron_cp.context.attend import Plan, Sizes, attend, plan
from megatron_cp.context.auto import settle
from megatron_cp.context.layouts import ZIGZAG
from megatron_cp.grid import most_square
from megatron_cp.quiet import without_import_warnings

MakeImplementation = Callable[[Comparison, str], Implementation]
"""Makes the implementation of another library; raises RefusedError for a shape that it cannot compute."""


@dataclass(frozen=True, kw_only=True)
class BackendReport:
    """All figures of a run.

    kernel, reason: the kernel that all use, and why it was chosen
    core_share: smallest share of its core that a rank got while it only computed
    cores:      cores or GPUs of all ranks together
    pairs:      our backends beside other libraries
    """

    rows: list[BackendResult]
    kernel: str
    reason: str
    core_share: float
    cores: int
    pairs: tuple[Pair, ...] = ()

    @property
    def quiet(self) -> bool:
        """True if background load was low enough to trust the result."""
        return self.core_share >= QUIET

    @property
    def judged(self) -> list[BackendResult]:
        """Rows as they are shown: without a share of the ideal where the machine was busy."""
        return self.rows if self.quiet else [replace(row, share_of_ideal=None) for row in self.rows]

    def as_json(self) -> list[dict[str, Any]]:
        """Return one object per candidate; `share_of_ideal` is null where the machine was busy."""
        return [row.as_json() for row in self.judged if row.backend != WHOLE]


@dataclass(frozen=True)
class Selection:
    """Implementations to compare.

    backends: names of our own
    native:   run them on tokens in the layout of each, not in Megatron's zigzag
    upstream: attention that a user would have without this package, by name
    peers:    add ring-flash-attn and yunchang, on the layouts of the backends
    predict:  simulate the backends' traces, with tiles timed in the same run
    """

    backends: tuple[str, ...]
    native: bool = False
    upstream: Mapping[str, MakeImplementation] = field(default_factory=dict)
    peers: bool = False
    predict: bool = False


def bench(
    selection: Selection, ranks: int, shapes: Sequence[AttentionShape], rounds: int, kernel: str = "auto"
) -> BackendReport:
    """Run `ranks` processes of this machine (pinned to cores on a CPU) and measure; the candidates take turns.

    Raises RuntimeError when a backend's result differs from the whole kernel call.
    """
    if selection.peers:
        installed()
    if selection.predict and any(shape.batch > 1 for shape in shapes):
        raise ValueError("traces are of one sequence, so that --predict needs --batch 1; use more heads instead")
    return on_ranks(ranks, _report, selection, list(shapes), rounds, kernel, _cores(ranks))[0]


def _report(
    fabric: Fabric,
    device: torch.device,
    selection: Selection,
    shapes: list[AttentionShape],
    rounds: int,
    kernel: str,
    cores: int,
) -> BackendReport:
    rows: list[BackendResult] = []
    pairs: list[Pair] = []
    shares, chosen = [], None
    for shape in shapes:
        comparison = Comparison(fabric, device, shape, kernel)
        chosen = comparison.kernel
        entered = [_checked(comparison, entry) for entry in _entries(comparison, selection)]
        running = [candidate for candidate in entered if not candidate.problem]
        forecast = Forecast(comparison, selection.backends, selection.native) if selection.predict else None
        timed: list[TimedPasses | Forecast] = [comparison.whole, *([forecast] if forecast else []), *running]
        for turn in range(rounds):
            # another one begins in each round, because each finds the caches as its predecessor left them
            first = turn % len(timed)
            for one in (*timed[first:], *timed[:first]):
                one.time()
        shares.append(comparison.whole.core_share)
        rows += [comparison.row(), *(candidate.row() for candidate in entered)]
        if forecast:
            rows = [replace(row, predicted=forecast.predicted(row)) for row in rows]
        pairs += pairs_of(running, shape.seq)
    assert chosen is not None, "no shape was asked for"
    return BackendReport(
        rows=rows, kernel=chosen[0].name, reason=chosen[1], core_share=min(shares), cores=cores, pairs=tuple(pairs)
    )


def _cores(ranks: int) -> int:
    """Return the number of cores or GPUs that the ranks have."""
    gpus = torch.cuda.device_count()
    return gpus if gpus >= ranks else len(psutil.Process().cpu_affinity())


def _checked(comparison: Comparison, entry: Implementation) -> Candidate:
    candidate = Candidate(comparison, entry)
    candidate.check()
    return candidate


def _entries(comparison: Comparison, selection: Selection) -> Iterator[Implementation]:
    mine = [ours(comparison, name, selection.native) for name in selection.backends]
    yield from mine
    yield from (upstream(comparison, name, enter) for name, enter in selection.upstream.items())
    if selection.peers:
        # only those with the layout of one of ours
        layouts = {entry.layout for entry in mine}
        yield from (theirs(comparison, peer) for peer in installed() if peer.layout in layouts)


def ours(comparison: Comparison, name: str, native: bool) -> Implementation:
    """Return a backend of the registry, on tokens in its own layout if `native`, else in Megatron's zigzag."""
    fabric, backend, shape = comparison.fabric, BACKENDS.get(name), comparison.shape
    inner, outer = axes_of(most_square(fabric.size), fabric) if backend.needs_grid else (None, None)
    layout = (backend.layout if native else None) or ZIGZAG
    how = plan(
        name, cp=fabric, inner=inner, outer=outer, causal=shape.causal, kernel=comparison.kernel_name, layout=layout
    )

    def sent(run: Callable[[], None]) -> int:
        before = how.sent
        run()
        return how.sent - before

    return Implementation(
        name, layout, lambda q, k, v: attend(q, k, v, how, agreed=True), sent, took=_took(how, comparison)
    )


def _took(how: Plan, comparison: Comparison) -> str:
    if how.backend.name != AUTO:
        return ""
    shape = comparison.shape
    sizes = Sizes(shape.seq, shape.heads, shape.kv_heads, shape.head_dim, shape.dtype, comparison.device.type)
    settled = settle(how, sizes)
    return f"{settled.backend.name}; {settled.why}"


def theirs(comparison: Comparison, peer: Peer) -> Implementation:
    """Return another library's function, on tokens in its own layout."""
    function, causal = load(peer, comparison.kernel[0]), comparison.shape.causal

    def sent(run: Callable[[], None]) -> int:
        with counted() as sizes:
            run()
        return sum(sizes)

    # no group means all processes
    return Implementation(peer.name, peer.layout, lambda q, k, v: function(q, k, v, causal, None), sent, trusted=False)


def upstream(comparison: Comparison, name: str, enter: MakeImplementation) -> Implementation:
    """Return the attention of Megatron or torch; one that refuses the shape raises at its first call, as others do."""
    without_import_warnings()
    try:
        return enter(comparison, name)
    except RefusedError as refusal:
        reason = refusal

    def refuse(*_: torch.Tensor) -> torch.Tensor:
        raise reason

    return Implementation(name, None, refuse, sends_nothing, trusted=False)
