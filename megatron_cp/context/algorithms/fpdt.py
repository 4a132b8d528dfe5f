"""FPDT: the work of a backend cut into chunks over time, with what waits in host memory.

Tokens are exchanged in u parts: part c is the c-th of u equal stretches of every piece of a rank's tokens (zigzag has
two pieces, other layouts one), so that all ranks have equal shares of it. What the exchange brings lies in host memory,
in sequence order. From there it is attended in u segments: q of segment i against k and v of each segment j, merged
over j. Segments, too, are equal stretches of every piece of what a rank has now, so they are one segment at different
distances: (i, j) is the inner attention over the positions of segment 0 under a shifted mask, and is left out where no
rank sees anything.

In the paper, and by default here, the backend is Ulysses: a rank has its heads of the whole sequence between the
exchanges, and with any u it sends what Ulysses sends, (p-1)/p (2Uq + 2U) forward and the same backward. USP has a ring
between them, other backends exchange nothing and are called as a whole: a loop inside is called for n pairs, n <= u u,
each time with 1/u of the tokens, and sends n/u times as much as without chunks.

Memory beside the local q, k, v, out, dout, dq, dk, dv is O(1/u). Over the host link go, in elements of one rank,
forward: q, k, v, out, lse down; q, out and n/u times K and V up. Backward: dout, dq and n/u times the float32 sums of
dK and dV down; q, out, lse, dout, dq, n/u times K and V and n/u times the sums up. Causal: n = u (u + 1) / 2, but u u
for a loop inside on zigzag, whose segments have early and late tokens.

Source: Yao et al. 2024, arXiv:2408.16978. There a chunk of all ranks must be one stretch of the sequence, the mask
causal, and every chunk ends in a barrier; here copies are ordered by events.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_cp.context import layouts
from megatron_cp.context.algorithms import ring, ulysses, usp
from megatron_cp.context.heads import Hands, Swap
from megatron_cp.context.host_store import HostStore, Lanes, Stretches, visits
from megatron_cp.context.layouts import Layout, Runs, length
from megatron_cp.context.masks import Mask
from megatron_cp.context.merge import SoftmaxMerge, Sum
from megatron_cp.context.task import Saved, Task
from megatron_cp.context.tiles import tiles

CHUNK_TOKENS = 65536
"""Tokens of the whole sequence in a chunk, as the paper recommends."""

FEWEST_CHUNKS = 4
"""Fewer do not pay: attention keeps about 2/u of its memory."""


def forward(q: Tensor, k: Tensor, v: Tensor, task: Task) -> tuple[Tensor, Saved]:
    """q [s b h d], k and v [s b g d] of this rank -> out [s b h d]; what is saved lies in host memory.

    Raises ValueError for a number of chunks that does not divide the tokens, and what the backend inside raises.
    """
    work, lanes = chunked(task), Lanes(q.device)
    queries, keys, values = stores = _to_host((q, k, v), work, lanes)
    results: list[HostStore] = []
    for i, mine in enumerate(work.segments):
        q_i = queries.get(mine).wait()
        merge = SoftmaxMerge(q_i)
        for j, fetched in work.visits(i, [keys, values], []):
            work.attend(merge, q_i, fetched, i, j)
        results = _put(results, merge.result(), mine, work, lanes)
    (out,) = _from_host(results[:1], q, work)
    lanes.settle()
    return out, Saved(*(store.memory for store in (*stores, *results)))


def backward(dout: Tensor, saved: Saved, task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """dout [s b h d] -> dq, dk, dv; the loops of the forward pass, sums of dK and dV wait in host memory."""
    work, lanes = chunked(task), Lanes(dout.device)
    (douts,) = _to_host((dout,), work, lanes)
    queries, keys, values, outs, lses = (HostStore(memory, lanes) for memory in saved)
    dq: list[HostStore] = []
    sums: list[HostStore] = []
    for i, mine in enumerate(work.segments):
        arriving = [store.get(mine) for store in (douts, queries, outs, lses)]
        dout_i, q_i, out_i, lse_i = (arrival.wait() for arrival in arriving)
        dq_i = Sum(q_i)
        for j, fetched in work.visits(i, [keys, values], sums):
            dk_dv_j = work.attend_backward(dq_i, dout_i, (q_i, out_i, lse_i), fetched, i, j)
            sums = _put(sums, dk_dv_j, work.segments[j], work, lanes)
            del dk_dv_j
        dq = _put(dq, (dq_i.result(),), mine, work, lanes)
    dq_, dk, dv = _from_host([*dq, *sums], dout, work)
    return dq_, dk, dv


class Part(NamedTuple):
    """What is exchanged at once: `local` tokens of each rank, and where they stand in host memory.

    places: tokens in host memory, tokens of what the exchange brings
    """

    local: Stretches
    swap: "Swap | NoSwap"
    places: tuple[tuple[slice, slice], ...]


class Chunked(NamedTuple):
    """What is exchanged, and what is attended by `loop` on `inside`, a task over the positions of the first segment.

    tokens: how many there are in host memory
    shift:  by how much further on the next segment's positions are
    """

    parts: tuple[Part, ...]
    segments: tuple[Stretches, ...]
    tokens: int
    shift: int
    inside: Task
    loop: ModuleType

    def mask(self, i: int, j: int) -> Mask:
        """Which keys of segment j a query of segment i sees, as positions of the first segment."""
        return self.inside.mask.shifted((i - j) * self.shift)

    def seen(self, i: int) -> list[int]:
        """The segments of which a query of segment i sees a key, on any rank."""
        return [j for j in range(len(self.segments)) if _sees(self.inside.runs, self.mask(i, j))]

    def visits(self, i: int, stores: list[HostStore], partial: list[HostStore]) -> Iterator[tuple[int, list[Tensor]]]:
        """What the queries of segment i see, from the stores."""
        seen = self.seen(i)
        return zip(seen, visits([self.segments[j] for j in seen], stores, partial), strict=True)

    def attend(self, merge: SoftmaxMerge, q: Tensor, kv: list[Tensor], i: int, j: int) -> None:
        """Merge attention of one pair of segments."""
        (k, v), task = kv, replace(self.inside, mask=self.mask(i, j))
        if self.loop is ring:
            ring.attend_around(merge, q, k, v, task)
        else:
            out, saved = self.loop.forward(q, k, v, task)
            merge.add(slice(0, len(q)), out, saved.lse)

    def attend_backward(
        self, dq: Sum, dout: Tensor, mine: tuple[Tensor, Tensor, Tensor], fetched: list[Tensor], i: int, j: int
    ) -> tuple[Tensor, Tensor]:
        """Add the gradient of `mine`, q with out and lse of all keys; the sums of dk, dv with what was fetched of them.

        `fetched` is k, v, and the sums so far unless this is the first part of them.
        """
        (q, out, lse), (k, v, *before) = mine, fetched
        dk, dv = Sum(k, *before[:1]), Sum(v, *before[1:])
        task, saved = replace(self.inside, mask=self.mask(i, j)), Saved(q, k, v, out, lse)
        if self.loop is ring:
            ring.attend_around_backward(dq, dk, dv, dout, saved, task)
        else:
            for total, part in zip((dq, dk, dv), self.loop.backward(dout, saved, task), strict=True):
                total.add(slice(0, len(part)), part)
        return dk.exact(), dv.exact()


class NoSwap:
    """Nothing is exchanged: the backend inside takes all heads of a rank's tokens."""

    hands = Hands((), ())

    def to_heads(self, *tensors: Tensor) -> list[Tensor]:
        return list(tensors)

    def to_tokens(self, tensors: Sequence[Tensor], dealt: Sequence[Sequence[slice]]) -> list[Tensor]:
        return list(tensors)


def chunked(task: Task) -> Chunked:
    """The backend of `task.chunks` taken apart into its exchange and what is between the two."""
    count, backend = task.chunks or (None, None)
    backend = backend or ulysses

    def split(runs: Layout) -> tuple[Swap | NoSwap, Task]:
        over = task.on(task.fabric, runs, task.kernel)
        return backend.split(over) if backend in (ulysses, usp) else (NoSwap(), over)

    chunks = cut(task.runs, count)
    _, whole = split(task.runs)
    parts = []
    for local, runs in zip(chunks.tokens, chunks.runs, strict=True):
        swap, part = split(runs)
        parts.append(Part(local, swap, _places(part.mine, whole.mine)))
    segments = cut(whole.runs, len(parts))
    inside = whole.on(whole.fabric, segments.runs[0], whole.kernel)
    loop = ring if backend in (ulysses, usp) else backend
    return Chunked(tuple(parts), segments.tokens, length(whole.mine), segments.shift, inside, loop)


class Cut(NamedTuple):
    """Chunks of every rank's tokens: local tokens, the same on all ranks, and the ranks' positions.

    Every next chunk stands `shift` positions further on, on all ranks.
    """

    tokens: tuple[Stretches, ...]
    runs: tuple[Layout, ...]
    shift: int


@cache
def cut(runs: Layout, count: int | None) -> Cut:
    """Cut every rank's tokens into `count` chunks; None is the smallest number that makes them at most CHUNK_TOKENS.

    That is at least FEWEST_CHUNKS. Raises ValueError when `count` does not divide the tokens of a piece.
    """
    pieces, piece = layouts.pieces(runs)
    if count is None:
        wanted = max(FEWEST_CHUNKS, -(-pieces * piece * len(runs) // CHUNK_TOKENS))
        count = next((n for n in range(wanted, piece + 1) if piece % n == 0), piece)
    layouts.check_chunks(runs, count)
    stretches = tuple(_stretches(pieces, piece, piece // count, chunk) for chunk in range(count))
    positions = tuple(tuple(_positions(own, chunk) for own in runs) for chunk in stretches)
    shift = positions[-1][0][0].start - positions[0][0][0].start
    step = shift // (count - 1) if count > 1 else 0
    for chunk, layout in enumerate(positions):
        assert layout == tuple(tuple(_moved(run, chunk * step) for run in own) for own in positions[0])
    return Cut(stretches, positions, step)


def _stretches(pieces: int, piece: int, size: int, chunk: int) -> Stretches:
    starts = (index * piece + chunk * size for index in range(pieces))
    return tuple(slice(start, start + size) for start in starts)


def _positions(runs: Runs, tokens: Stretches) -> Runs:
    return layouts.join([run for stretch in tokens for run in layouts.cut(runs, stretch)])


def _moved(run: range, shift: int) -> range:
    return range(run.start + shift, run.stop + shift, run.step)


@cache
def _places(part: Runs, whole: Runs) -> tuple[tuple[slice, slice], ...]:
    """Where the tokens of a part stand in the whole, in the part's order."""
    found = sorted(layouts.moves((part,), (whole,)), key=lambda move: move.src_tokens.start)
    return tuple(
        (slice(move.dst_tokens.start, move.dst_tokens.stop), slice(move.src_tokens.start, move.src_tokens.stop))
        for move in found
    )


@cache
def _sees(runs: Layout, mask: Mask) -> bool:
    return any(tiles(queries, keys, mask) for queries in runs for keys in runs)


def _to_host(tensors: tuple[Tensor, ...], work: Chunked, lanes: Lanes) -> list[HostStore]:
    """(q, k, v) or (dout) of this rank's tokens -> what is attended here, in host memory."""
    stores: list[HostStore] = []
    for part in work.parts:
        dealt = part.swap.to_heads(*(torch.cat([x[tokens] for tokens in part.local]) for x in tensors))
        stores = stores or [HostStore.like(x, work.tokens, lanes) for x in dealt]
        for store, x in zip(stores, dealt, strict=True):
            store.put(x, part.places)
    return stores


def _from_host(stores: list[HostStore], like: Tensor, work: Chunked) -> list[Tensor]:
    """(out) or (dq, dk, dv) of what was attended here, in host memory -> of this rank's tokens, rounded once."""
    heads = [work.inside.heads[0], *(work.inside.heads[1] for _ in stores[1:])]
    results = [like.new_empty((*like.shape[:2], n, like.shape[3])) for n in heads]
    for part in work.parts:
        arriving = [store.get(tuple(there for there, _ in part.places)) for store in stores]
        mine = [arrival.wait().to(like.dtype) for arrival in arriving]
        hands = part.swap.hands
        for result, x in zip(results, part.swap.to_tokens(mine, [hands.q, *(hands.kv for _ in mine[1:])]), strict=True):
            for tokens, piece in zip(part.local, x.chunk(len(part.local)), strict=True):
                result[tokens] = piece
    return results


def _put(
    stores: list[HostStore], results: Sequence[Tensor], tokens: Stretches, work: Chunked, lanes: Lanes
) -> list[HostStore]:
    """The stores, made with the first results, with these results put there."""
    stores = stores or [HostStore.like(x, work.tokens, lanes) for x in results]
    size = tokens[0].stop - tokens[0].start
    places = [(there, slice(index * size, (index + 1) * size)) for index, there in enumerate(tokens)]
    for store, x in zip(stores, results, strict=True):
        store.put(x, places)
    return stores
