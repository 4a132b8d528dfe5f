"""The queries of a row of ranks meet the keys of a column of ranks: the loop of WallFacer and StarTrail.

Queries come to every rank of their row and their results go back; keys and values come by in hops, and how these travel
is up to the caller. Source: Liu et al. 2024, arXiv:2407.00611; the backward pass is derived here.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from megatron_cp.comm import Done, Handle
from megatron_cp.context import cache_sizes
from megatron_cp.context.delta import delta, stand_in
from megatron_cp.context.layouts import Layout, Runs
from megatron_cp.context.masks import AnyMask
from megatron_cp.context.merge import SoftmaxMerge, Sum
from megatron_cp.context.remembered import remembered
from megatron_cp.context.returns import Incoming, Outgoing, QueryShard, Returns, empty_like, exchange, incoming_exact
from megatron_cp.context.task import Block, Queries, Saved, Task
from megatron_cp.context.tiles import hull, seen


class Tiling(NamedTuple):
    """Which ranks meet: rows[rank] are those whose queries the rank has, hops[rank][hop] those whose keys arrive."""

    rows: tuple[tuple[int, ...], ...]
    hops: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def last(self) -> int:
        """The number of the last hop, counted from 1."""
        return len(self.hops[0])

    def used(self, owner: int, worker: int, layout: Layout, mask: AnyMask) -> slice:
        """Return the stretch of the owner's queries that sees any of the keys that arrive at the worker."""
        column = tuple(layout[rank] for ranks in self.hops[worker] for rank in ranks)
        return stretch(column, layout[owner], mask.mirrored)

    def wanted(self, owner: int, worker: int, layout: Layout, mask: AnyMask) -> slice:
        """Return the stretch of the owner's keys that any of the queries at the worker sees."""
        return stretch(tuple(layout[rank] for rank in self.rows[worker]), layout[owner], mask)


@remembered(cache_sizes.PAIRS)
def stretch(queries: Layout, keys: Runs, mask: AnyMask) -> slice:
    """Return the stretch of the keys that any of these ranks' queries sees."""
    return hull(tuple(seen(mine, keys, mask) for mine in queries))


def forward(
    q: Tensor, k: Tensor, v: Tensor, blocks: Iterator[list[Block]], tiling: Tiling, task: Task
) -> tuple[Tensor, Saved]:
    """Attend: q [s b h d], k and v [s b g d] of this rank, and the blocks of each hop -> out [s b h d]."""
    merge, returns = SoftmaxMerge(q, v.shape[3]), Returns(task.fabric)
    # 1. gather the queries of the row
    row = [
        (shard, arrival, merge if shard.own else SoftmaxMerge(shard.tensors[0], v.shape[3]))
        for shard, arrival in _gather([q], tiling, task)
    ]
    # 2. the keys of the column arrive hop by hop
    for hop, column in enumerate(blocks, 1):
        for shard, arrival, partial in _in_turn(row, hop):
            arrival.wait()
            # 3. attend every rank's queries to every block at hand
            for block in column:
                task.attend(partial, shard.tensors[0], block, shard.queries)
            # 4. after the last hop, return the partial results to the owners of the queries
            if hop == tiling.last and not shard.own:
                returns.start(*shard.returns(partial.result(), merge))
    returns.finish()
    out, lse = merge.result()
    return out, Saved(q, k, v, out, lse)


def backward(
    dout: Tensor, saved: Saved, blocks: Iterator[list[Block]], tiling: Tiling, task: Task
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate: dout [s b h d], and the blocks of each hop -> dq, dk, dv.

    Queries, their output gradients, lse and delta come as the queries did; parts of dq, rounded once, and of dk and dv,
    in float32, go straight to their owners and are added there in float32.
    """
    dq, dk, dv = Sum(saved.q), Sum(saved.k), Sum(saved.v)
    returns, key_returns = Returns(task.fabric), Returns(task.fabric)
    # 1. gather the queries of the row with dout, lse and delta
    row = [
        (shard, arrival, dq if shard.own else Sum(shard.tensors[0]))
        for shard, arrival in _gather([saved.q, dout, saved.lse, delta(saved.out, dout)], tiling, task)
    ]
    known = {task.fabric.rank: saved}
    # 2. the keys of the column arrive hop by hop
    for hop, column in enumerate(blocks, 1):
        sums = [(dk, dv) if block.owner == task.fabric.rank else (Sum(block.k), Sum(block.v)) for block in column]
        for shard, arrival, partial in _in_turn(row, hop):
            arrival.wait()
            q, dout_here, lse, row_delta = shard.tensors
            if shard.queries.owner not in known:
                known[shard.queries.owner] = Saved(q, saved.k, saved.v, stand_in(row_delta, dout_here), lse)
            # 3. add to the queries' dq and to the blocks' dk and dv
            for block, (dk_block, dv_block) in zip(column, sums, strict=True):
                inputs = known[shard.queries.owner]
                task.attend_backward(partial, dk_block, dv_block, dout_here, inputs, block, shard.queries)
            # 4. after the last hop, return dq to the owners of the queries
            if hop == tiling.last and not shard.own:
                returns.start(*shard.returns([partial.result()], dq))
        # 5. after each hop, return dk and dv to the owners of the keys
        key_returns.start(*_key_returns(hop, column, sums, (dk, dv), tiling, task))
    returns.finish()
    key_returns.finish()
    return dq.result(), dk.result(), dv.result()


def _gather(tensors: list[Tensor], tiling: Tiling, task: Task) -> list[tuple[QueryShard, Handle]]:
    """Start to gather the queries of every rank of the row, this rank's own first; each comes with its transfer."""
    fabric, layout, mask = task.fabric, task.layout, task.mask
    me, row = fabric.rank, tiling.rows[fabric.rank]
    at = row.index(me)
    own = QueryShard(task.my_queries, tensors, worker=me, lent=slice(0, 0), own=True)
    shards: list[tuple[QueryShard, Handle]] = [(own, Done())]
    for hop in range(1, len(row)):
        worker, owner = row[(at + hop) % len(row)], row[(at - hop) % len(row)]
        lent, here = tiling.used(me, worker, layout, mask), tiling.used(owner, me, layout, mask)
        arriving = empty_like(tensors, here.stop - here.start)
        transfer = exchange(fabric, [tensor[lent] for tensor in tensors], worker, arriving, owner)
        queries = Queries(owner, here, here.start)
        shards.append((QueryShard(queries, arriving, worker=worker, lent=lent, own=False), transfer))
    return shards


def _in_turn[T](row: list[T], hop: int) -> list[T]:
    """Put own queries first while the others are on their way, and last while the others' results are."""
    return row if hop == 1 else [*row[1:], row[0]]


def _key_returns(
    hop: int, column: list[Block], sums: list[tuple[Sum, Sum]], totals: tuple[Sum, Sum], tiling: Tiling, task: Task
) -> tuple[list[Outgoing], list[Incoming]]:
    """Return this hop's dk and dv to the owners of the keys, and expect the others' parts for this rank's keys."""
    me, layout, mask = task.fabric.rank, task.layout, task.mask
    outgoing = [
        Outgoing(
            block.owner,
            block._replace(k=dk.exact(), v=dv.exact()).part(tiling.wanted(block.owner, me, layout, mask)),
        )
        for block, (dk, dv) in zip(column, sums, strict=True)
        if block.owner != me
    ]
    workers = [rank for rank, hops in enumerate(tiling.hops) if rank != me and me in hops[hop - 1]]
    expected = [incoming_exact(worker, tiling.wanted(me, worker, layout, mask), *totals) for worker in workers]
    return outgoing, [item for items in expected for item in items]
