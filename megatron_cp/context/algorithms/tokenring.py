"""TokenRing: queries travel around the ring, partial results go straight back to their owners, keys and values stay.

Per rank and layer the forward pass sends (p - 1) Uq of queries one way and (p - 1) (Uq + Us) of results the other; the
backward pass, which the paper does not have, sends (p - 1) (2 Uq + 2 Us) of queries, output gradients and row
statistics one way and (p - 1) Uq of query gradients the other, with Uq = s b h d elements in the queries' dtype and
Us = s b h in the accumulator's. Under a causal mask on the zigzag layout each part is 3/4 of this, summed over ranks.

Source: Wang et al. 2024, arXiv:2412.20501. Queries take the route that keys take in Ring Attention under the mirrored
mask.
"""

from collections.abc import Iterator

from torch import Tensor

from megatron_cp.context.algorithms.ring import route
from megatron_cp.context.circulate import Shard, circulate
from megatron_cp.context.delta import delta, stand_in
from megatron_cp.context.merge import SoftmaxMerge, Sum
from megatron_cp.context.returns import QueryShard, Returns
from megatron_cp.context.task import Block, Queries, Saved, Task


def forward(q: Tensor, k: Tensor, v: Tensor, task: Task) -> tuple[Tensor, Saved]:
    """Attend: q [s b h d], k and v [s b g d] of this rank -> out [s b h d].

    Queries that no rank further on needs stay behind. The owner merges partial results in float32; they travel in the
    queries' dtype with float32 row statistics, while the next queries are computed.
    """
    merge, mine, returns = SoftmaxMerge(q, v.shape[3]), Block(task.fabric.rank, 0, k, v), Returns(task.fabric)
    # 1. pass the queries on, and receive the next ones during the body
    for shard in _circulating([q], task):
        # 2. attend the queries at hand to this rank's keys
        (q_here,) = shard.tensors
        partial = merge if shard.own else SoftmaxMerge(q_here, v.shape[3])
        task.attend(partial, q_here, mine, shard.queries)
        # 3. return the partial result to the owner of the queries, which merges it
        if not shard.own:
            returns.start(*shard.returns(partial.result(), merge))
    returns.finish()
    out, lse = merge.result()
    return out, Saved(q, k, v, out, lse)


def backward(dout: Tensor, saved: Saved, task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate: dout [s b h d] -> dq, dk, dv.

    Queries, their output gradients, lse and delta travel as the queries did; each rank's part of dq goes straight to
    its owner and is added there in float32, while dk and dv stay with their owner.
    """
    dq, dk, dv = Sum(saved.q), Sum(saved.k), Sum(saved.v)
    mine, returns = Block(task.fabric.rank, 0, saved.k, saved.v), Returns(task.fabric)
    # 1. pass queries, dout, lse and delta on, and receive the next ones during the body
    for shard in _circulating([saved.q, dout, saved.lse, delta(saved.out, dout)], task):
        # 2. add to dk and dv here, and to this rank's part of the queries' dq
        q, dout_here, lse, row_delta = shard.tensors
        partial = dq if shard.own else Sum(q)
        inputs = saved if shard.own else Saved(q, saved.k, saved.v, stand_in(row_delta, dout_here), lse)
        task.attend_backward(partial, dk, dv, dout_here, inputs, mine, shard.queries)
        # 3. return that part to the owner of the queries
        if not shard.own:
            returns.start(*shard.returns([partial.result()], dq))
    returns.finish()
    return dq.result(), dk.result(), dv.result()


def _circulating(tensors: list[Tensor], task: Task) -> Iterator[QueryShard]:
    """Yield this rank's own queries, then every other rank's; the next ones are in flight during the body."""
    me, size, way = task.fabric.rank, task.fabric.size, route(task.layout, task.mask.mirrored)
    hops = circulate([Shard(me, 0, tensors)], [way], task.fabric)
    # a reference would keep this rank's delta alive until the last hop
    del tensors
    for hop, ((owner, first, here),) in enumerate(hops):
        worker = (me + way.turn * hop) % size
        queries = Queries(owner, way.wanted[owner][me], first)
        yield QueryShard(queries, here, worker=worker, lent=way.wanted[me][worker], own=hop == 0)
        del here
