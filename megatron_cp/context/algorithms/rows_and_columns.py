"""The queries of a row of ranks meet the keys of a column of ranks: the loop of WallFacer and StarTrail.

Queries come to every rank of their row and their results go back; keys and values come by in hops, and how these travel
is up to the caller. Source: Liu et al. 2024, arXiv:2407.00611; the backward pass is derived here.
"""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from torch import Tensor

from megatron_cp.comm import Done, Handle
from megatron_cp.context.delta import delta, stand_in
from megatron_cp.context.layouts import Layout, Runs
from megatron_cp.context.masks import Mask
from megatron_cp.context.merge import SoftmaxMerge, Sum
from megatron_cp.context.returns import Due, Leaving, Returns, Visit, empty_like, exchange
from megatron_cp.context.task import Block, Queries, Saved, Task
from megatron_cp.context.tiles import hull, seen


class Tiling(NamedTuple):
    """Who attends to whom: rows[rank] are the ranks whose queries it has, hops[rank][hop] those whose keys come by."""

    rows: tuple[tuple[int, ...], ...]
    hops: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def last(self) -> int:
        """The number of the last hop, counted from 1."""
        return len(self.hops[0])

    def used(self, owner: int, host: int, runs: Layout, mask: Mask) -> slice:
        """The stretch of a rank's queries that sees any of the keys that come by at `host`."""
        column = tuple(runs[rank] for ranks in self.hops[host] for rank in ranks)
        return stretch(column, runs[owner], mask.mirrored)

    def wanted(self, owner: int, host: int, runs: Layout, mask: Mask) -> slice:
        """The stretch of a rank's keys that any of the queries at `host` sees."""
        return stretch(tuple(runs[rank] for rank in self.rows[host]), runs[owner], mask)


@cache
def stretch(queries: Layout, keys: Runs, mask: Mask) -> slice:
    """The stretch of the keys that any of these ranks' queries sees."""
    return hull(tuple(seen(mine, keys, mask) for mine in queries))


def forward(
    q: Tensor, k: Tensor, v: Tensor, blocks: Iterator[list[Block]], tiling: Tiling, task: Task
) -> tuple[Tensor, Saved]:
    """q [s b h d], k and v [s b g d] of this rank, the blocks of each hop -> out [s b h d]."""
    merge, home = SoftmaxMerge(q), Returns(task.fabric)
    party = [
        (visit, arrival, merge if visit.at_home else SoftmaxMerge(visit.tensors[0]))
        for visit, arrival in _gather([q], tiling, task)
    ]
    for hop, visitors in enumerate(blocks, 1):
        for visit, arrival, partial in _in_turn(party, hop):
            arrival.wait()
            for block in visitors:
                task.attend(partial, visit.tensors[0], block, visit.queries)
            if hop == tiling.last and not visit.at_home:
                home.start(*visit.results(partial.result(), merge))
    home.finish()
    out, lse = merge.result()
    return out, Saved(q, k, v, out, lse)


def backward(
    dout: Tensor, saved: Saved, blocks: Iterator[list[Block]], tiling: Tiling, task: Task
) -> tuple[Tensor, Tensor, Tensor]:
    """dout [s b h d], the blocks of each hop -> dq, dk, dv.

    Queries, their output gradients, lse and delta come as the queries did; parts of dq, dk and dv go straight to their
    owners, rounded once, and are added there in float32.
    """
    dq, dk, dv = Sum(saved.q), Sum(saved.k), Sum(saved.v)
    home, keys_home = Returns(task.fabric), Returns(task.fabric)
    party = [
        (visit, arrival, dq if visit.at_home else Sum(visit.tensors[0]))
        for visit, arrival in _gather([saved.q, dout, saved.lse, delta(saved.out, dout)], tiling, task)
    ]
    known = {task.fabric.rank: saved}
    for hop, visitors in enumerate(blocks, 1):
        sums = [(dk, dv) if block.owner == task.fabric.rank else (Sum(block.k), Sum(block.v)) for block in visitors]
        for visit, arrival, partial in _in_turn(party, hop):
            arrival.wait()
            q, douts, lse, row_delta = visit.tensors
            if visit.queries.owner not in known:
                known[visit.queries.owner] = Saved(q, saved.k, saved.v, stand_in(row_delta, douts), lse)
            for block, (dk_block, dv_block) in zip(visitors, sums, strict=True):
                inputs = known[visit.queries.owner]
                task.attend_backward(partial, dk_block, dv_block, douts, inputs, block, visit.queries)
            if hop == tiling.last and not visit.at_home:
                home.start(*visit.results([partial.result()], dq))
        keys_home.start(*_homeward(hop, visitors, sums, (dk, dv), tiling, task))
    home.finish()
    keys_home.finish()
    return dq.result(), dk.result(), dv.result()


def _gather(tensors: list[Tensor], tiling: Tiling, task: Task) -> list[tuple[Visit, Handle]]:
    """The queries of every rank of the row, this rank's own first, and what to wait for before they can be used."""
    fabric, runs, mask = task.fabric, task.runs, task.mask
    me, row = fabric.rank, tiling.rows[fabric.rank]
    at = row.index(me)
    guests: list[tuple[Visit, Handle]] = [(Visit(task.my_queries, tensors, me, slice(0, 0), True), Done())]
    for hop in range(1, len(row)):
        host, owner = row[(at + hop) % len(row)], row[(at - hop) % len(row)]
        away, here = tiling.used(me, host, runs, mask), tiling.used(owner, me, runs, mask)
        arriving = empty_like(tensors, here.stop - here.start)
        transfer = exchange(fabric, [tensor[away] for tensor in tensors], host, arriving, owner)
        guests.append((Visit(Queries(owner, here, here.start), arriving, host, away, False), transfer))
    return guests


def _in_turn[T](party: list[T], hop: int) -> list[T]:
    """Own queries go first while the guests are on their way, and last while the guests' results are."""
    return party if hop == 1 else [*party[1:], party[0]]


def _homeward(
    hop: int, visitors: list[Block], sums: list[tuple[Sum, Sum]], totals: tuple[Sum, Sum], tiling: Tiling, task: Task
) -> tuple[list[Leaving], list[Due]]:
    """What this hop computed for the keys' owners, and what others computed in it for this rank's keys."""
    me, runs, mask = task.fabric.rank, task.runs, task.mask

    def add(rows: slice, *parts: Tensor) -> None:
        for total, part in zip(totals, parts, strict=True):
            total.add(rows, part)

    leaving = [
        Leaving(
            block.owner,
            block._replace(k=dk.result(), v=dv.result()).part(tiling.wanted(block.owner, me, runs, mask)),
        )
        for block, (dk, dv) in zip(visitors, sums, strict=True)
        if block.owner != me
    ]
    workers = [rank for rank, hops in enumerate(tiling.hops) if rank != me and me in hops[hop - 1]]
    due = [(worker, tiling.wanted(me, worker, runs, mask)) for worker in workers]
    return leaving, [Due(worker, rows, [*totals[0].room(rows), *totals[1].room(rows)], add) for worker, rows in due]
