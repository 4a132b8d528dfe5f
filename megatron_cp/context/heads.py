"""Heads for tokens and back: the exchange of Ulysses, for any number of query heads, KV heads and ranks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_cp.comm import Done, Fabric, Handle, Message
from megatron_cp.context import cache_sizes
from megatron_cp.context.layouts import Layout, Place, Runs, gathered
from megatron_cp.context.merge import Sum
from megatron_cp.context.packing import packed, unpacked, with_dim
from megatron_cp.kernels import Kernel, takes_windows

CHUNKS = 2
"""How many parts of a rank's heads follow each other: the exchange of one runs beside the attention of another."""


class HeadShares(NamedTuple):
    """The query heads of every rank, and the KV heads that these need."""

    q: tuple[slice, ...]
    kv: tuple[slice, ...]


@lru_cache(cache_sizes.LAYOUTS)
def share_heads(heads: int, kv_heads: int, ranks: int) -> HeadShares:
    """Give every rank a stretch of query heads, one more to the first `heads % ranks` ranks; each rank gets some."""
    assert ranks <= heads, f"{ranks} ranks cannot share {heads} query heads"
    few, more = divmod(heads, ranks)
    starts = [rank * few + min(rank, more) for rank in range(ranks + 1)]
    group = heads // kv_heads
    q = tuple(slice(start, stop) for start, stop in pairwise(starts))
    return HeadShares(q, tuple(slice(share.start // group, (share.stop - 1) // group + 1) for share in q))


class HeadChunk(NamedTuple):
    """Part of every rank's heads.

    shares:   the query heads, and the KV heads that these need
    arriving: KV heads that come with the queries; the others are there already
    leaving:  KV heads whose queries have all been attended after it
    """

    shares: HeadShares
    arriving: tuple[slice, ...]
    leaving: tuple[slice, ...]

    def leaves(self, rank: int) -> bool:
        """True if all queries of some KV head of this rank have been attended."""
        return self.leaving[rank].start < self.leaving[rank].stop


@lru_cache(cache_sizes.LAYOUTS)
def cut(shares: HeadShares, *, within_group: bool) -> tuple[HeadChunk, ...]:
    """Cut every rank's heads into CHUNKS parts, or one if some rank has too few.

    A part is whole KV heads with their queries; a single KV head stays while its queries come in parts if
    `within_group`.
    """
    count = min(CHUNKS, *(_share(q, kv, within_group) for q, kv in zip(*shares, strict=True)))
    group = _group_size(shares)
    # ranks of parts -> parts of ranks
    parts = zip(*(_split(q, kv, count, group) for q, kv in zip(*shares, strict=True)), strict=True)
    chunks = [HeadShares(*zip(*part, strict=True)) for part in parts]
    before, after = [None, *chunks[:-1]], [*chunks[1:], None]
    return tuple(
        HeadChunk(chunk, _not_in(chunk, previous), _not_in(chunk, following))
        for chunk, previous, following in zip(chunks, before, after, strict=True)
    )


def _share(q: slice, kv: slice, within_group: bool) -> int:
    """Return into how many parts the heads of a rank can be cut."""
    kv_heads = kv.stop - kv.start
    return q.stop - q.start if kv_heads == 1 and within_group else kv_heads


def _split(q: slice, kv: slice, count: int, group: int) -> list["_Part"]:
    # too few KV heads to cut: every part of the queries needs the same ones
    if count == 1 or kv.stop - kv.start < count:
        return [_Part(piece, kv) for piece in pieces(q, count)]
    # KV head i serves query heads i * group .. (i + 1) * group - 1, of which the rank may have some only
    return [
        _Part(slice(max(q.start, piece.start * group), min(q.stop, piece.stop * group)), piece)
        for piece in pieces(kv, count)
    ]


def pieces(whole: slice, count: int) -> list[slice]:
    """Cut a stretch into `count` parts whose lengths differ by one at most."""
    size = whole.stop - whole.start
    return [slice(a, b) for a, b in pairwise(whole.start + size * index // count for index in range(count + 1))]


def _not_in(chunk: HeadShares, neighbour: HeadShares | None) -> tuple[slice, ...]:
    """Return each rank's KV heads, none if the neighbouring chunk has the same."""
    others = neighbour.kv if neighbour else (None,) * len(chunk.kv)
    return tuple(slice(0, 0) if kv == other else kv for kv, other in zip(chunk.kv, others, strict=True))


@dataclass(frozen=True)
class ArrivingHeads:
    """Some heads of all tokens in flight."""

    transfer: Handle
    buffer: Tensor
    heads: Sequence[tuple[int, int]]

    def wait(self) -> list[Tensor]:
        """Return the tensors, in sequence order, views of one buffer."""
        self.transfer.wait()
        return unpacked(self.buffer, self.heads)


@dataclass(frozen=True)
class HeadExchange:
    """The exchange of heads for tokens among the ranks of a fabric."""

    fabric: Fabric
    members: Layout
    shares: HeadShares

    @property
    def whole(self) -> Runs:
        return gathered(self.members)[0]

    @property
    def places(self) -> tuple[Place, ...]:
        return gathered(self.members)[1]

    @property
    def my_places(self) -> list[Place]:
        """The stretches of this rank's own tokens."""
        return [place for place in self.places if place.rank == self.fabric.rank]

    def partial(self, total: Tensor, dtype: torch.dtype) -> Tensor:
        """Return this rank's sums for gradients of KV heads, rounded only if no other rank has a part of them."""
        return total.to(dtype) if _disjoint(self.shares.kv) else total

    def to_heads(self, *tensors: Tensor) -> list[Tensor]:
        """Turn (q) or (q, k, v) with all heads of my tokens into my heads of all tokens, in one exchange.

        The results are in sequence order and views of one buffer; the stretches of each rank arrive in their place.
        """
        return self.start_to_heads(tensors, [self.shares.q, self.shares.kv, self.shares.kv][: len(tensors)]).wait()

    def visits(
        self, tensors: Sequence[Tensor], per_rank: Sequence[Sequence[Sequence[slice]]]
    ) -> Iterator[list[Tensor]]:
        """Yield my heads of all tokens, one chunk after the other; the next one is in flight during the body."""
        arriving = self.start_to_heads(tensors, per_rank[0])
        for after in (*per_rank[1:], None):
            here = arriving.wait()
            if after is not None:
                arriving = self.start_to_heads(tensors, after)
            yield here

    def start_to_heads(self, tensors: Sequence[Tensor], per_rank: Sequence[Sequence[slice]]) -> ArrivingHeads:
        """Send every rank its heads of this rank's tokens."""
        fabric, me = self.fabric, self.fabric.rank
        shares = [
            packed(*(x[:, :, share[rank]] for x, share in zip(tensors, per_rank, strict=True)))
            for rank in range(fabric.size)
        ]
        tokens = sum(place.whole.stop - place.whole.start for place in self.places)
        buffer = tensors[0].new_empty((tokens, *shares[me].shape[1:]))
        sends, recvs = [], []
        for rank, local, where in self.places:
            if rank == me:
                buffer[where] = shares[me][local]
                sends += [(shares[peer][local], peer) for peer in range(fabric.size) if peer != me]
            else:
                recvs.append((buffer[where], rank))
        heads = [(share[me].stop - share[me].start, x.shape[3]) for x, share in zip(tensors, per_rank, strict=True)]
        return ArrivingHeads(fabric.exchange(sends, recvs), buffer, heads)

    def to_tokens(self, tensors: Sequence[Tensor], per_rank: Sequence[Sequence[slice]]) -> list[Tensor]:
        """Turn my heads of all tokens into all heads of my tokens; heads on several ranks are added in float32."""
        returns = HeadReturns(self, per_rank)
        returns.start(tensors, per_rank)
        return returns.results()

    def kernel(self, kernel: Kernel, shares: HeadShares | None = None) -> Kernel:
        """Return the kernel for my part of `shares`, by default all my heads.

        It calls `kernel` once per stretch of KV heads that serve equally many of my query heads.
        """
        me, held = self.fabric.rank, shares or self.shares
        parts = _parts(held.q[me], held.kv[me], _group_size(self.shares))
        return kernel if len(parts) == 1 else _UnevenHeads(kernel, parts)


class HeadReturns:
    """Return of my heads of all tokens, one batch in flight; results have all heads of this rank's tokens.

    per_rank: the heads of each rank, per tensor; those of several ranks are added in float32
    """

    def __init__(self, swap: HeadExchange, per_rank: Sequence[Sequence[slice]]) -> None:
        self._swap, self._per_rank = swap, per_rank
        self._results: list[_DisjointHeads | _SummedHeads] = []
        self._transfer: Handle = Done()
        self._in_flight: list[_FusedHeads] = []

    def start(self, tensors: Sequence[Tensor], parts: Sequence[Sequence[slice]]) -> None:
        """Send these heads, `parts` of the ranks' heads, after the previous batch has been put in place.

        Tensors of one dtype and head dim travel in one message; the results have the dtype of the first one.
        """
        self.finish()
        if not self._results:
            tokens = sum(place.local.stop - place.local.start for place in self._swap.my_places)
            like = tensors[0][:tokens]
            self._results = [
                _result_for(with_dim(like, x.shape[3]), shares)
                for x, shares in zip(tensors, self._per_rank, strict=True)
            ]
        items = zip(self._results, tensors, parts, strict=True)
        self._in_flight = [
            _fused(list(group), self._swap)
            for _, group in groupby(items, key=lambda item: (item[1].dtype, item[1].shape[3]))
        ]
        messages = [fused.messages(self._swap) for fused in self._in_flight]
        sends, recvs = ([message for batch in side for message in batch] for side in zip(*messages, strict=True))
        self._transfer = self._swap.fabric.exchange(sends, recvs)

    def finish(self) -> None:
        """Wait for the batch in flight and put it in place."""
        self._transfer.wait()
        for fused in self._in_flight:
            fused.put()
        self._in_flight = []

    def results(self) -> list[Tensor]:
        """Return the tensors once everything has arrived."""
        self.finish()
        return [result.result() for result in self._results]


class _FusedHeads(NamedTuple):
    """Tensors of one dtype on their way from heads to tokens.

    parts:    the heads of each rank, per result
    mine:     my heads of all tokens
    arriving: each rank's heads of my tokens
    """

    results: "Sequence[_DisjointHeads | _SummedHeads]"
    parts: Sequence[Sequence[slice]]
    mine: Tensor
    arriving: Sequence[Tensor]

    def messages(self, swap: HeadExchange) -> tuple[list[Message], list[Message]]:
        """Return what this rank sends and receives, after it has put its own part in place."""
        me, others = swap.fabric.rank, [rank for rank in range(swap.fabric.size) if rank != swap.fabric.rank]
        for _, local, where in swap.my_places:
            self.arriving[me][local] = self.mine[where]
        sends = [(self.mine[where], rank) for rank, _, where in swap.places if rank != me and self.mine.shape[2]]
        stretches = [local for _, local, _ in swap.my_places]
        arriving = [(self.arriving[rank], rank) for rank in others if self.arriving[rank].shape[2]]
        return sends, [(buffer[local], rank) for local in stretches for buffer, rank in arriving]

    def put(self) -> None:
        """Put what has arrived into the results."""
        for rank, tensor in enumerate(self.arriving):
            sizes = [shares[rank].stop - shares[rank].start for shares in self.parts]
            for result, shares, heads in zip(self.results, self.parts, tensor.split(sizes, dim=2), strict=True):
                result.add(shares[rank], heads)


def _fused(
    items: "Sequence[tuple[_DisjointHeads | _SummedHeads, Tensor, Sequence[slice]]]", swap: HeadExchange
) -> _FusedHeads:
    """Put tensors of one dtype into one buffer, with room for what other ranks send."""
    results, tensors, parts = zip(*items, strict=True)
    mine = torch.cat(tensors, 2) if len(tensors) > 1 else tensors[0].contiguous()
    tokens = sum(place.local.stop - place.local.start for place in swap.my_places)
    heads = [sum(shares[rank].stop - shares[rank].start for shares in parts) for rank in range(swap.fabric.size)]
    arriving = [mine.new_empty((tokens, mine.shape[1], count, mine.shape[3])) for count in heads]
    return _FusedHeads(results, parts, mine, arriving)


class _DisjointHeads:
    """A result whose heads each come from one rank."""

    def __init__(self, like: Tensor, heads: int) -> None:
        self._all = like.new_empty((*like.shape[:2], heads, like.shape[3]))

    def add(self, heads: slice, part: Tensor) -> None:
        self._all[:, :, heads] = part

    def result(self) -> Tensor:
        return self._all


class _SummedHeads:
    """A result with heads of which several ranks have a part."""

    def __init__(self, like: Tensor, heads: int) -> None:
        # heads first, so that they are the rows of a sum
        self._sum = Sum(like.new_empty((heads, *like.shape[:2], like.shape[3])))

    def add(self, heads: slice, part: Tensor) -> None:
        # s b g d -> g s b d
        self._sum.add(heads, part.movedim(2, 0))

    def result(self) -> Tensor:
        return self._sum.result().movedim(0, 2)


def _result_for(like: Tensor, shares: Sequence[slice]) -> _DisjointHeads | _SummedHeads:
    return (_DisjointHeads if _disjoint(shares) else _SummedHeads)(like, shares[-1].stop)


def _disjoint(shares: Sequence[slice]) -> bool:
    """True if no head is on two ranks."""
    return all(left.stop == right.start for left, right in pairwise(shares))


class _Part(NamedTuple):
    q: slice
    kv: slice


class _UnevenHeads:
    """A kernel over heads of which some KV heads serve more query heads than others; nothing is repeated."""

    def __init__(self, kernel: Kernel, parts: Sequence[_Part]) -> None:
        self.name, self.windows = kernel.name, takes_windows(kernel)
        self._kernel, self._parts = kernel, parts

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **mask: Any) -> tuple[Tensor, Tensor]:
        results = [
            self._kernel.forward(q[:, :, part.q], k[:, :, part.kv], v[:, :, part.kv], **mask) for part in self._parts
        ]
        outs, lses = zip(*results, strict=True)
        return torch.cat(outs, 2), torch.cat(lses, 2)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, **mask: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        results = []
        for a, c in self._parts:
            dout_a, q_a, out_a, lse_a = (x[:, :, a] for x in (dout, q, out, lse))
            k_c, v_c = k[:, :, c], v[:, :, c]
            results.append(self._kernel.backward(dout_a, q_a, k_c, v_c, out_a, lse_a, **mask))
        dq, dk, dv = (torch.cat(parts, 2) for parts in zip(*results, strict=True))
        return dq, dk, dv


def _group_size(shares: HeadShares) -> int:
    return shares.q[-1].stop // shares.kv[-1].stop


def _parts(q: slice, kv: slice, group: int) -> list[_Part]:
    """Stretches of KV heads that each serve the same number of the query heads in `q`, relative to the share."""
    parts: list[_Part] = []
    for head in range(kv.start, kv.stop):
        served = slice(max(q.start, head * group) - q.start, min(q.stop, (head + 1) * group) - q.start)
        count = served.stop - served.start
        if parts and count * (parts[-1].kv.stop - parts[-1].kv.start) == parts[-1].q.stop - parts[-1].q.start:
            last = parts.pop()
            parts.append(_Part(slice(last.q.start, served.stop), slice(last.kv.start, head - kv.start + 1)))
        else:
            parts.append(_Part(served, slice(head - kv.start, head - kv.start + 1)))
    return parts
