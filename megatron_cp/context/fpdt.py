"""FPDT: the work of a backend cut into chunks over time, with what waits in host memory.

Chunk c is the c-th of u equal stretches of every piece of a rank's tokens (zigzag has two pieces, other layouts one).
So the chunks are one chunk at different distances: q of chunk i against k and v of chunk j is the backend's own
attention over the positions of chunk 0, under a shifted mask. For each i the results over all j are merged; pairs of
which no rank sees anything are left out.

In the paper, and by default here, the backend is Ulysses. Its exchange is made once per chunk, and what is attended
between the exchanges comes from the host, so that with any u it sends what Ulysses sends: (p-1)/p (2Uq + 2U) forward,
the same backward. Other backends are called as a whole for each of the n pairs of chunks, n <= u u, each of which sends
1/u of what the backend sends: n/u times as much in all.

Memory beside the local q, k, v, out, dout, dq, dk, dv is O(1/u). Over the host link go, in elements of one rank:
forward q, k, v, out and lse down, q up, and n/u times K and V up; backward q, out and lse up, n/u times K and V up,
n/u times the float32 sums of dK and dV down and as often, but for the first, up. Under a causal mask
n = u (u + 1) / 2 over striped positions; on zigzag every chunk has early and late tokens, and n = u u.

Source: Yao et al. 2024, arXiv:2408.16978. There a chunk of all ranks is one stretch of the sequence, the mask is
causal, and every chunk ends in a barrier; here copies are ordered by events.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_cp.context import layouts, ring, ulysses, usp
from megatron_cp.context.heads import Hands, Swap
from megatron_cp.context.host_store import HostStore, Lanes, visits
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
    """q [s b h d], k and v [s b g d] of this rank -> out [s b h d]; what is saved lies in host memory, by chunks.

    Raises ValueError for a number of chunks that does not divide the tokens, and what the backend inside raises.
    """
    plan, lanes = stages(task), Lanes(q.device)
    queries, keys, values = stores = _deal_out((q, k, v), plan, lanes)
    outs: list[HostStore] = []
    result = torch.empty_like(q, memory_format=torch.contiguous_format)
    for i in range(plan.cut.count):
        q_i = queries.get(i).wait()
        merge = SoftmaxMerge(q_i)
        for j, fetched in visits(plan.keys_of(i), [keys, values], []):
            plan.attend(merge, q_i, fetched, i, j)
        done = merge.result()
        outs = outs or _stores_like(done, plan, lanes)
        for store, x in zip(outs, done, strict=True):
            store.put(i, x)
        plan.write(result, i, done[0])
    lanes.settle()
    return result, Saved(*(store.memory for store in (*stores, *outs)))


def backward(dout: Tensor, saved: Saved, task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """dout [s b h d] -> dq, dk, dv; the loops of the forward pass, sums of dK and dV wait in host memory."""
    plan, lanes = stages(task), Lanes(dout.device)
    queries, keys, values, outs, lses = (HostStore(memory, lanes) for memory in saved)
    dq = torch.empty_like(dout, memory_format=torch.contiguous_format)
    sums: list[HostStore] = []
    for i in range(plan.cut.count):
        arriving = [store.get(i) for store in (queries, outs, lses)]
        (dout_i,) = plan.swap.to_heads(plan.cut.take(dout, i))
        q_i, out_i, lse_i = (arrival.wait() for arrival in arriving)
        dq_i = Sum(q_i)
        for j, fetched in visits(plan.keys_of(i), [keys, values], sums):
            k_j, v_j, *before = fetched
            dk_j, dv_j = Sum(k_j, *before[:1]), Sum(v_j, *before[1:])
            plan.attend_backward((dq_i, dk_j, dv_j), dout_i, Saved(q_i, k_j, v_j, out_i, lse_i), i, j)
            sums = sums or _stores_like((dk_j.exact(), dv_j.exact()), plan, lanes)
            for store, total in zip(sums, (dk_j, dv_j), strict=True):
                store.put(j, total.exact())
        plan.write(dq, i, dq_i.result())
    return dq, *_collect(sums, dout, task.heads[1], plan)


class Cut(NamedTuple):
    """`count` chunks: of each of a rank's `pieces` one stretch; `runs` are the positions of the first chunk.

    Every next chunk stands `shift` positions further on, on all ranks.
    """

    count: int
    pieces: int
    runs: Layout
    shift: int

    def part(self, x: Tensor, chunk: int) -> Tensor:
        """The tokens of a chunk in x: [pieces, tokens of a stretch, ...]."""
        # (m u n) b h d -> m n b h d
        return x.unflatten(0, (self.pieces, self.count, -1))[:, chunk]

    def take(self, x: Tensor, chunk: int) -> Tensor:
        """The tokens of a chunk, one after the other."""
        return self.part(x, chunk).flatten(0, 1)

    def stretches(self, chunk: Tensor) -> Tensor:
        """A chunk's tokens, one after the other, in the shape of `part`."""
        return chunk.unflatten(0, (self.pieces, -1))


@cache
def cut(runs: Layout, count: int | None) -> Cut:
    """Cut every rank's tokens into `count` chunks; None is the smallest number that makes them at most CHUNK_TOKENS.

    That is at least FEWEST_CHUNKS. Raises ValueError when `count` does not divide the tokens of a piece.
    """
    pieces, local = max(map(len, runs)), length(runs[0])
    piece, tokens = local // pieces, local * len(runs)
    if count is None:
        wanted = max(FEWEST_CHUNKS, -(-tokens // CHUNK_TOKENS))
        count = next((n for n in range(wanted, piece + 1) if piece % n == 0), piece)
    if count < 1 or piece % count:
        unit = max(count, 1) * pieces * len(runs)
        raise ValueError(
            f"chunks must divide the {piece} tokens of each of a rank's {pieces} pieces, got chunks = {count}; "
            f"take a divisor or pad S = {tokens} to {-(-tokens // unit) * unit}"
        )
    first, second = (tuple(_chunk(own, pieces, piece, piece // count, c) for own in runs) for c in (0, 1))
    shift = second[0][0].start - first[0][0].start if count > 1 else 0
    assert count == 1 or second == tuple(tuple(_moved(run, shift) for run in own) for own in first)
    return Cut(count, pieces, first, shift)


def _chunk(runs: Runs, pieces: int, piece: int, stretch: int, chunk: int) -> Runs:
    starts = (index * piece + chunk * stretch for index in range(pieces))
    return layouts.join([run for start in starts for run in layouts.cut(runs, slice(start, start + stretch))])


def _moved(run: range, shift: int) -> range:
    return range(run.start + shift, run.stop + shift, run.step)


class NoSwap:
    """Nothing is exchanged: the backend takes all heads of a rank's tokens."""

    hands = Hands((), ())

    def to_heads(self, *tensors: Tensor) -> list[Tensor]:
        return list(tensors)

    def to_tokens(self, tensors: Sequence[Tensor], dealt: Sequence[Sequence[slice]]) -> list[Tensor]:
        return list(tensors)


class Stages(NamedTuple):
    """What is done once per chunk (`swap`), and what is done per pair of chunks (`loop` on `inside`)."""

    cut: Cut
    swap: Swap | NoSwap
    inside: Task
    loop: ModuleType

    def between(self, i: int, j: int) -> Task:
        """Queries of chunk i with keys of chunk j."""
        return replace(self.inside, mask=self.mask(i, j))

    def mask(self, i: int, j: int) -> Mask:
        """The mask as the first chunk's positions see it."""
        return self.inside.mask.shifted((i - j) * self.cut.shift)

    def keys_of(self, i: int) -> list[int]:
        """The chunks of which any query of chunk i sees a key, the same on all ranks."""
        return [j for j in range(self.cut.count) if _sees(self.inside.runs, self.mask(i, j))]

    def attend(self, merge: SoftmaxMerge, q: Tensor, kv: list[Tensor], i: int, j: int) -> None:
        """Merge attention of one pair of chunks."""
        if self.loop is ring:
            ring.attend_around(merge, q, *kv, self.between(i, j))
        else:
            out, saved = self.loop.forward(q, *kv, self.between(i, j))
            merge.add(slice(0, len(q)), out, saved.lse)

    def attend_backward(self, totals: tuple[Sum, Sum, Sum], dout: Tensor, saved: Saved, i: int, j: int) -> None:
        """Add the gradients of one pair of chunks; out and lse are of all keys."""
        if self.loop is ring:
            ring.attend_around_backward(*totals, dout, saved, self.between(i, j))
        else:
            for total, part in zip(totals, self.loop.backward(dout, saved, self.between(i, j)), strict=True):
                total.add(slice(0, len(part)), part)

    def write(self, result: Tensor, chunk: int, mine: Tensor) -> None:
        """Write a chunk's q, out or dq, which has my heads of all tokens, to its place in all heads of my tokens."""
        (tokens,) = self.swap.to_tokens([mine], [self.swap.hands.q])
        self.cut.part(result, chunk).copy_(self.cut.stretches(tokens))


def stages(task: Task) -> Stages:
    """The backend of `task.chunks` taken apart."""
    count, loop = task.chunks or (None, None)
    loop, parts = loop or ulysses, cut(task.runs, count)
    first = task.on(task.fabric, parts.runs, task.kernel)
    if loop in (ulysses, usp):
        return Stages(parts, *loop.split(first), ring)
    return Stages(parts, NoSwap(), first, loop)


@cache
def _sees(runs: Layout, mask: Mask) -> bool:
    return any(tiles(queries, keys, mask) for queries in runs for keys in runs)


def _deal_out(tensors: tuple[Tensor, ...], plan: Stages, lanes: Lanes) -> list[HostStore]:
    """Every chunk of q, k, v with my heads, in host memory."""
    stores: list[HostStore] = []
    for chunk in range(plan.cut.count):
        dealt = plan.swap.to_heads(*(plan.cut.take(x, chunk) for x in tensors))
        stores = stores or _stores_like(dealt, plan, lanes)
        for store, x in zip(stores, dealt, strict=True):
            store.put(chunk, x)
    return stores


def _stores_like(chunks: Sequence[Tensor], plan: Stages, lanes: Lanes) -> list[HostStore]:
    return [HostStore.like(x, plan.cut.count, lanes) for x in chunks]


def _collect(sums: list[HostStore], like: Tensor, heads: int, plan: Stages) -> list[Tensor]:
    """dk and dv of this rank's tokens, rounded once and sent to their owners chunk by chunk."""
    kv = plan.swap.hands.kv
    results = [like.new_empty((*like.shape[:2], heads, store.memory.shape[-1])) for store in sums]
    for chunk in range(plan.cut.count):
        arriving = [store.get(chunk) for store in sums]
        totals = [arrival.wait().to(like.dtype) for arrival in arriving]
        for result, total in zip(results, plan.swap.to_tokens(totals, [kv, kv]), strict=True):
            plan.cut.part(result, chunk).copy_(plan.cut.stretches(total))
    return results
