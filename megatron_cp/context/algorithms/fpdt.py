"""FPDT: an algorithm's work cut into chunks over time; what is not in use waits in host memory.

    1. exchange      chunk 0 | chunk 1 | chunk 2 | chunk 3       heads for tokens, and into host memory

    2. fetch,             k, v of segment j
    3. attend             0    1    2    3
       q of          0    x                                      q of segment i stays on the device,
       segment i     1    x    x                                 k and v of segment j are fetched one ahead,
                     2    x    x    x                            results are merged over j
                     3    x    x    x    x                       (causal mask, u = 4)

    4. exchange      chunk 0 | chunk 1 | chunk 2 | chunk 3       out of host memory, and tokens for heads

Chunk c is the c-th of u equal stretches of every piece of a rank's tokens (zigzag has two pieces, other layouts one),
so all ranks have equal shares of it. Segment i is the i-th of u equal stretches of every piece that a rank has between
the exchanges. All segments are segment 0 at different distances: pair (i, j) is attention over the positions of
segment 0 under a shifted mask, of pieces that are moved on either side, and is left out if no rank sees anything.

In the paper, and by default here, the algorithm is Ulysses: a rank has its heads of the whole sequence between the
exchanges, and with any u it sends as much as Ulysses, (p-1)/p (2Uq + 2U) forward and as much backward. USP has a ring
between them. Other algorithms exchange nothing and run once for each of n pairs, n <= u u, each time with 1/u of the
tokens, and send n/u times as much as without chunks.

Memory beside the local q, k, v, out, dout, dq, dk, dv is O(1/u). Over the host link go, in elements of one rank,
forward: q, k, v, out, lse down; q, out and n/u times K and V up. Backward: dout, dq and n/u times the float32 sums of
dK and dV down; q, out, lse, dout, dq, n/u times K and V and n/u times the sums up. Causal: n = u (u + 1) / 2, but u u
for a loop inside on zigzag, whose segments have early and late tokens.

Source: Yao et al. 2024, arXiv:2408.16978. There a chunk of all ranks must be one stretch of the sequence, the mask
causal, and every chunk ends in a barrier; here copies are ordered by events.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_cp.context import cache_sizes, layouts, sinks
from megatron_cp.context.algorithms import ring, ulysses
from megatron_cp.context.heads import HeadExchange, HeadShares
from megatron_cp.context.host_store import HostStore, HostTransfers, Stretches, visits
from megatron_cp.context.layouts import Layout, Runs, length
from megatron_cp.context.loop import Accumulating, HeadParallel, Loop
from megatron_cp.context.masks import AnyMask, Pieces
from megatron_cp.context.merge import SoftmaxMerge, Sum
from megatron_cp.context.remembered import remembered
from megatron_cp.context.task import Saved, Task
from megatron_cp.context.tiles import tiles

CHUNK_TOKENS = 65536
"""Tokens of the whole sequence in a chunk, as the paper recommends."""

FEWEST_CHUNKS = 4
"""Fewest chunks by default: attention keeps about 2/u of its memory."""


@dataclass(frozen=True)
class FPDT:
    """The loop of an algorithm cut into chunks over time; in the paper and by default the algorithm is Ulysses."""

    inside: Loop[Any] = ulysses

    def forward(self, q: Tensor, k: Tensor, v: Tensor, task: Task) -> tuple[Tensor, Saved]:
        """Attend: q [s b h d], k and v [s b g d] of this rank -> out [s b h d]; saved tensors are in host memory.

        Raises ValueError for a number of chunks that does not divide the tokens, and the errors of the loop inside.
        """
        work, transfers = chunked(task, self.inside), HostTransfers(q.device)
        # 1. exchange chunk after chunk of q, k and v, and put what arrives into host memory
        queries, keys, values = stores = _to_host((q, k, v), work, transfers)
        results: list[HostStore] = []
        for i, mine in enumerate(work.segments):
            # 2. fetch the queries of segment i, and the keys and values of each segment j one ahead
            q_i = queries.get(mine).wait()
            merge = SoftmaxMerge(q_i, v.shape[3])
            for j, fetched in work.fetches(i, [keys, values], []):
                # 3. attend i to j, merged over j
                work.attend(merge, q_i, fetched, i, j)
            rows = merge.result() if work.sink is None else sinks.merged(*merge.result(), work.sink)
            results = _put(results, rows, mine, work, transfers)
        # 4. exchange back chunk after chunk of out
        (out,) = _from_host(results[:1], q, work)
        transfers.settle()
        return out, Saved(*(store.memory for store in (*stores, *results)))

    def backward(self, dout: Tensor, saved: Saved, task: Task) -> tuple[Tensor, ...]:
        """Differentiate: dout [s b h d] -> dq, dk, dv; sums of dK and dV wait in host memory."""
        work, transfers = chunked(task, self.inside), HostTransfers(dout.device)
        # 1. exchange chunk after chunk of dout
        (douts,) = _to_host((dout,), work, transfers)
        queries, keys, values, outs, lses = (HostStore(memory, transfers) for memory in saved)
        dq: list[HostStore] = []
        sums: list[HostStore] = []
        # of this rank's heads only
        dsink = [] if task.sink is None else [torch.zeros_like(task.sink)]
        for i, mine in enumerate(work.segments):
            # 2. fetch what belongs to segment i, and keys, values and their sums so far of each segment j one ahead
            arriving = [store.get(mine) for store in (douts, queries, outs, lses)]
            dout_i, q_i, out_i, lse_i = (arrival.wait() for arrival in arriving)
            dq_i = Sum(q_i)
            for j, fetched in work.fetches(i, [keys, values], sums):
                # 3. add to dq of i here, and to the sums of dk and dv of j, which go back to host memory
                dk_dv_j = work.attend_backward(dq_i, dout_i, (q_i, out_i, lse_i), fetched, i, j)
                sums = _put(sums, dk_dv_j, work.segments[j], work, transfers)
                del dk_dv_j
            dq = _put(dq, (dq_i.result(),), mine, work, transfers)
            if work.sink is not None:
                dsink[0][..., work.heads] += sinks.gradient(dout_i, out_i, lse_i, work.sink)
        # 4. exchange back chunk after chunk of dq, dk and dv
        return *_from_host([*dq, *sums], dout, work), *dsink


@dataclass(frozen=True)
class RoundedResults:
    """A loop that returns results in the inputs' dtype, as one that accumulates them."""

    loop: Loop[Saved]

    def attend_around(self, merge: SoftmaxMerge, q: Tensor, k: Tensor, v: Tensor, task: Task) -> None:
        """Merge the loop's result."""
        out, saved = self.loop.forward(q, k, v, task)
        merge.add(slice(0, len(q)), out, saved.lse)

    def attend_around_backward(self, dq: Sum, dk: Sum, dv: Sum, dout: Tensor, saved: Saved, task: Task) -> None:
        """Add the loop's gradients."""
        for total, part in zip((dq, dk, dv), self.loop.backward(dout, saved, task), strict=True):
            total.add(slice(0, len(part)), part)


class ExchangedChunk(NamedTuple):
    """Tokens that are exchanged at once: `local` tokens of each rank, and their places in host memory.

    places: pairs of tokens in host memory and tokens that the exchange brings
    """

    local: Stretches
    swap: "HeadExchange | NoExchange"
    places: tuple[tuple[slice, slice], ...]


class ChunkedWork(NamedTuple):
    """Chunks to exchange, and segments to attend by `loop` on `inside`, a task over the positions of segment 0.

    tokens: number of tokens in host memory
    shift:  distance in positions from one segment to the next
    heads:  query heads of a rank's own that it has between the exchanges
    sink:   of these heads
    """

    chunks: tuple[ExchangedChunk, ...]
    segments: tuple[Stretches, ...]
    tokens: int
    shift: int
    inside: Task
    loop: Accumulating
    heads: slice
    sink: Tensor | None

    def mask(self, i: int, j: int) -> AnyMask:
        """Return the mask of queries of segment i over keys of segment j, both as positions of segment 0."""
        mask = self.inside.mask
        if isinstance(mask, Pieces):
            return mask.moved(i * self.shift, j * self.shift)
        return mask.shifted((i - j) * self.shift)

    def seen(self, i: int) -> list[int]:
        """Return the segments of which a query of segment i sees a key, on any rank, and segment i itself."""
        # of documents whose keys lie elsewhere a segment may see none; every segment needs its results and sums
        return [j for j in range(len(self.segments)) if j == i or _sees(self.inside.layout, self.mask(i, j))]

    def fetches(self, i: int, stores: list[HostStore], partial: list[HostStore]) -> Iterator[tuple[int, list[Tensor]]]:
        """Yield each segment that queries of segment i see, fetched from the stores; the next one is on its way."""
        seen = self.seen(i)
        return zip(seen, visits([self.segments[j] for j in seen], stores, partial), strict=True)

    def attend(self, merge: SoftmaxMerge, q: Tensor, kv: list[Tensor], i: int, j: int) -> None:
        """Merge attention of one pair of segments."""
        k, v = kv
        self.loop.attend_around(merge, q, k, v, replace(self.inside, mask=self.mask(i, j)))

    def attend_backward(
        self, dq: Sum, dout: Tensor, mine: tuple[Tensor, Tensor, Tensor], fetched: list[Tensor], i: int, j: int
    ) -> tuple[Tensor, Tensor]:
        """Add the gradient of one pair of segments to dq, and return the sums of dk and dv.

        `mine` is q with out and lse of all keys; `fetched` is k, v, and the sums so far unless there are none yet.
        """
        (q, out, lse), (k, v, *before) = mine, fetched
        dk, dv = Sum(k, *before[:1]), Sum(v, *before[1:])
        task, saved = replace(self.inside, mask=self.mask(i, j)), Saved(q, k, v, out, lse)
        self.loop.attend_around_backward(dq, dk, dv, dout, saved, task)
        return dk.exact(), dv.exact()


class NoExchange:
    """The exchange of an algorithm that keeps all heads of a rank's tokens on the rank."""

    shares = HeadShares((), ())

    def to_heads(self, *tensors: Tensor) -> list[Tensor]:
        return list(tensors)

    def partial(self, total: Tensor, dtype: torch.dtype) -> Tensor:
        return total.to(dtype)

    def to_tokens(self, tensors: Sequence[Tensor], per_rank: Sequence[Sequence[slice]]) -> list[Tensor]:
        return list(tensors)


def chunked(task: Task, inside: Loop[Any]) -> ChunkedWork:
    """Cut the exchanges of the loop `inside` into chunks, and its attention between them into segments."""

    def split(layout: Layout) -> tuple[HeadExchange | NoExchange, Task]:
        over = task.on(task.fabric, layout, task.kernel)
        return inside.split(over) if isinstance(inside, HeadParallel) else (NoExchange(), over)

    cuts = cut(task.layout, task.chunks)
    exchange, whole = split(task.layout)
    heads = exchange.shares.q[exchange.fabric.rank] if isinstance(exchange, HeadExchange) else slice(None)
    chunks = []
    for local, layout in zip(cuts.tokens, cuts.layouts, strict=True):
        swap, part = split(layout)
        chunks.append(ExchangedChunk(local, swap, _places(part.mine, whole.mine)))
    segments = cut(whole.layout, len(chunks))
    first = whole.on(whole.fabric, segments.layouts[0], whole.kernel)
    loop = ring if isinstance(inside, HeadParallel) else inside
    accumulating = loop if isinstance(loop, Accumulating) else RoundedResults(loop)
    return ChunkedWork(
        chunks=tuple(chunks),
        segments=segments.tokens,
        tokens=length(whole.mine),
        shift=segments.shift,
        inside=first,
        loop=accumulating,
        heads=heads,
        sink=None if task.sink is None else task.sink[..., heads],
    )


class Cut(NamedTuple):
    """Chunks of every rank's tokens: each chunk's local tokens, equal on all ranks, and its layout.

    The positions of each chunk are those of the one before plus `shift`, on all ranks.
    """

    tokens: tuple[Stretches, ...]
    layouts: tuple[Layout, ...]
    shift: int


@lru_cache(cache_sizes.LAYOUTS)
def cut(layout: Layout, count: int | None) -> Cut:
    """Cut every rank's tokens into `count` chunks; None is the smallest number that makes them at most CHUNK_TOKENS.

    That is at least FEWEST_CHUNKS. Raises ValueError when `count` does not divide the tokens of a piece.
    """
    pieces, piece = layouts.pieces(layout)
    if count is None:
        wanted = max(FEWEST_CHUNKS, -(-pieces * piece * len(layout) // CHUNK_TOKENS))
        count = next((n for n in range(wanted, piece + 1) if piece % n == 0), piece)
    layouts.check_chunks(layout, count)
    stretches = tuple(_stretches(pieces, piece, piece // count, chunk) for chunk in range(count))
    cuts = tuple(tuple(_positions(runs, chunk) for runs in layout) for chunk in stretches)
    shift = cuts[-1][0][0].start - cuts[0][0][0].start
    step = shift // (count - 1) if count > 1 else 0
    for chunk, positions in enumerate(cuts):
        assert positions == tuple(tuple(_moved(run, chunk * step) for run in runs) for runs in cuts[0])
    return Cut(stretches, cuts, step)


def _stretches(pieces: int, piece: int, size: int, chunk: int) -> Stretches:
    starts = (index * piece + chunk * size for index in range(pieces))
    return tuple(slice(start, start + size) for start in starts)


def _positions(runs: Runs, tokens: Stretches) -> Runs:
    return layouts.join([run for stretch in tokens for run in layouts.cut(runs, stretch)])


def _moved(run: range, shift: int) -> range:
    return range(run.start + shift, run.stop + shift, run.step)


@lru_cache(cache_sizes.PAIRS)
def _places(part: Runs, whole: Runs) -> tuple[tuple[slice, slice], ...]:
    """Return the tokens of the whole and of the part that hold one position, in the part's order."""
    found = sorted(layouts.moves((part,), (whole,)), key=lambda move: move.src_tokens.start)
    return tuple(
        (slice(move.dst_tokens.start, move.dst_tokens.stop), slice(move.src_tokens.start, move.src_tokens.stop))
        for move in found
    )


@remembered(cache_sizes.PAIRS)
def _sees(layout: Layout, mask: AnyMask) -> bool:
    return any(tiles(queries, keys, mask) for queries in layout for keys in layout)


def _to_host(tensors: tuple[Tensor, ...], work: ChunkedWork, transfers: HostTransfers) -> list[HostStore]:
    """Exchange (q, k, v) or (dout) of this rank's tokens, and put what is attended here into host memory."""
    stores: list[HostStore] = []
    for chunk in work.chunks:
        arrived = chunk.swap.to_heads(*(torch.cat([x[tokens] for tokens in chunk.local]) for x in tensors))
        stores = stores or [HostStore.like(x, work.tokens, transfers) for x in arrived]
        for store, x in zip(stores, arrived, strict=True):
            store.put(x, chunk.places)
    return stores


def _from_host(stores: list[HostStore], like: Tensor, work: ChunkedWork) -> list[Tensor]:
    """Exchange (out) or (dq, dk, dv) of what was attended here back to the tokens' ranks."""
    heads = [work.inside.heads[0], *(work.inside.heads[1] for _ in stores[1:])]
    results = [
        like.new_empty((*like.shape[:2], n, store.memory.shape[3])) for n, store in zip(heads, stores, strict=True)
    ]
    for chunk in work.chunks:
        arriving = [store.get(tuple(there for there, _ in chunk.places)) for store in stores]
        first, *sums = (arrival.wait() for arrival in arriving)
        mine = [first.to(like.dtype), *(chunk.swap.partial(total, like.dtype) for total in sums)]
        heads_of = [chunk.swap.shares.q, *(chunk.swap.shares.kv for _ in mine[1:])]
        # zip alone holds what arrives, so that it is freed before the next chunk
        for result, x in zip(results, chunk.swap.to_tokens(mine, heads_of), strict=True):
            for tokens, piece in zip(chunk.local, x.chunk(len(chunk.local)), strict=True):
                result[tokens] = piece
    return results


def _put(
    stores: list[HostStore], results: Sequence[Tensor], tokens: Stretches, work: ChunkedWork, transfers: HostTransfers
) -> list[HostStore]:
    """Put these results into the stores, which are made with the first of them, and return the stores."""
    stores = stores or [HostStore.like(x, work.tokens, transfers) for x in results]
    size = tokens[0].stop - tokens[0].start
    places = [(there, slice(index * size, (index + 1) * size)) for index, there in enumerate(tokens)]
    for store, x in zip(stores, results, strict=True):
        store.put(x, places)
    return stores
