"""Time layouts of packed documents side by side: attention with its moves of tokens there and back."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_cp.bench.comparison import DTYPES, AttentionShape, TimedPasses, WrongResultError
from megatron_cp.bench.processes import on_ranks
from megatron_cp.comm import Fabric, SingleFabric, largest
from megatron_cp.context import DEFAULT
from megatron_cp.context.attend import Plan, attend, plan
from megatron_cp.context.document_layouts import loads
from megatron_cp.context.documents import Documents, documents
from megatron_cp.context.layouts import indices
from megatron_cp.context.masks import CAUSAL
from megatron_cp.context.self_check import LARGEST_ERROR

ONE_RANK = "one rank"


class LaidOut(NamedTuple):
    """An algorithm on a layout of documents; times in seconds and bytes are means over the streams.

    forward, backward: medians over the rounds of the slowest rank
    work:              unmasked pairs of the rank with most, over the mean of the ranks
    sent:              bytes of the rank that sends most, forward and backward
    """

    backend: str
    layout: str
    forward: float
    backward: float
    work: float
    sent: float
    max_error: float


@dataclass(frozen=True, kw_only=True)
class DocumentsBench:
    """A bench of layouts.

    streams: where the documents of each stream end, from 0 to its tokens
    cases:   algorithms with layouts of documents
    """

    shape: AttentionShape
    streams: Sequence[Sequence[int]]
    cases: Sequence[tuple[str, str]]
    kernel: str
    rounds: int


def measure_layouts(ranks: int, bench: DocumentsBench) -> list[LaidOut]:
    """Run `ranks` processes of this machine and measure, first attention over the whole stream on every rank.

    Raises RuntimeError when a result differs from that of one rank.
    """
    return on_ranks(ranks, measure, bench)[0]


def measure(fabric: Fabric, device: torch.device, bench: DocumentsBench) -> list[LaidOut]:
    """Measure on a rank of a group; the candidates take turns, and all ranks get the same figures."""
    by_stream = [_one_stream(fabric, device, bench, documents(ends)) for ends in bench.streams]
    return [_mean(rows) for rows in zip(*by_stream, strict=True)]


def _one_stream(fabric: Fabric, device: torch.device, bench: DocumentsBench, made: Documents) -> list[LaidOut]:
    whole = _inputs(bench.shape, made.tokens, device)
    alone = plan(DEFAULT, cp=SingleFabric(), causal=True, kernel=bench.kernel, layout="contiguous")
    candidates = [_Layout(fabric, device, alone, made, whole, ONE_RANK)]
    candidates += [
        _Layout(fabric, device, how, made, whole, how.backend.name)
        for how in (
            plan(backend, cp=fabric, causal=True, kernel=bench.kernel, document_layout=layout)
            for backend, layout in bench.cases
        )
    ]
    expected = candidates[0].results()
    rows = [candidate.checked(expected) for candidate in candidates]
    for _ in range(bench.rounds):
        for candidate in candidates:
            candidate.passes.time()
    return [
        row._replace(forward=candidate.passes.medians[0], backward=candidate.passes.medians[1])
        for row, candidate in zip(rows, candidates, strict=True)
    ]


class _Layout:
    """One plan on one stream, with this rank's tokens as Megatron cuts them."""

    def __init__(
        self,
        fabric: Fabric,
        device: torch.device,
        how: Plan,
        made: Documents,
        whole: Sequence[Tensor],
        name: str,
    ) -> None:
        self._fabric, self._device, self._plan, self._documents, self._name = fabric, device, how, made, name
        self._mine = torch.tensor(indices(how.layout, made.tokens, how.cp.size, how.cp.rank), device=device)
        *leaves, self._dout = (x[self._mine] for x in whole)
        self._leaves = [leaf.requires_grad_() for leaf in leaves]
        self.passes = TimedPasses(fabric, device, self._forward, self._backward)

    def results(self) -> list[Tensor]:
        """Return out, dq, dk and dv."""
        out = self._forward()
        self._backward(out)
        return [out.detach(), *(leaf.grad for leaf in self._leaves if leaf.grad is not None)]

    def checked(self, expected: Sequence[Tensor]) -> LaidOut:
        """Return all figures but the times; raises WrongResultError where results deviate from one rank's."""
        before = self._plan.sent
        found = self.results()
        deviation = max(
            ((ours - theirs[self._mine]).double().abs().max() / theirs.double().abs().max()).item()
            for ours, theirs in zip(found, expected, strict=True)
        )
        sent, error = largest(self._fabric, self._device, self._plan.sent - before, deviation)
        if not error <= LARGEST_ERROR[found[0].dtype]:
            raise WrongResultError(
                f"{self._name} on document layout {self._plan.document_layout!r} deviates from one rank by {error:.1e}"
            )
        ranks = self._plan.cp.size
        held = self._documents.planned(self._plan.document_layout, ranks)
        pairs = [load.pairs for load in loads(held, self._documents.mask(CAUSAL))]
        work = max(pairs) * ranks / sum(pairs)
        return LaidOut(self._name, self._plan.document_layout, 0.0, 0.0, work, sent, error)

    def _forward(self) -> Tensor:
        q, k, v = self._leaves
        return attend(q, k, v, self._plan, documents=self._documents)

    def _backward(self, out: Tensor) -> None:
        for leaf in self._leaves:
            leaf.grad = None
        out.backward(self._dout)


def _inputs(shape: AttentionShape, tokens: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    sizes = [(tokens, shape.batch, count, shape.head_dim) for count in heads]
    return [torch.randn(size, generator=generator).to(device, DTYPES[shape.dtype]) for size in sizes]


def _mean(rows: Sequence[LaidOut]) -> LaidOut:
    """Return the means over streams, and the largest error."""
    return rows[0]._replace(
        forward=fmean(row.forward for row in rows),
        backward=fmean(row.backward for row in rows),
        work=fmean(row.work for row in rows),
        sent=fmean(row.sent for row in rows),
        max_error=max(row.max_error for row in rows),
    )
