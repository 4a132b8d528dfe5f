"""TokenRing: queries travel around the ring, partial results go straight back to their owners, keys and values stay.

Per rank and layer the forward pass sends (p - 1) Uq of queries one way and (p - 1) (Uq + Us) of results the other; the
backward pass, which the paper does not have, sends (p - 1) (2 Uq + 2 Us) of queries, output gradients and row
statistics one way and (p - 1) Uq of query gradients the other, with Uq = s b h d elements in the queries' dtype and
Us = s b h in the accumulator's. Under a causal mask on the zigzag layout each part is 3/4 of this, summed over ranks.

Source: Wang et al. 2024, arXiv:2412.20501. Queries that are what keys are in Ring Attention take that ring's route,
seen from the side of the keys.
"""

from collections.abc import Iterator

from torch import Tensor

from megatron_cp.context.delta import delta, stand_in
from megatron_cp.context.merge import SoftmaxMerge, Sum
from megatron_cp.context.returns import Returns, Visit
from megatron_cp.context.ring import empty_like, exchange, route
from megatron_cp.context.task import Block, Queries, Saved, Task
from megatron_cp.context.tiles import seen


def forward(q: Tensor, k: Tensor, v: Tensor, task: Task) -> tuple[Tensor, Saved]:
    """q [s b h d], k and v [s b g d] of this rank -> out [s b h d].

    Queries that no rank further on needs stay behind. The owner merges partial results in float32; they travel in the
    queries' dtype with float32 row statistics, while the next visitors are computed.
    """
    merge, mine, home = SoftmaxMerge(q), Block(task.fabric.rank, 0, k, v), Returns(task.fabric)
    for visit in _visits([q], task):
        (guests,) = visit.tensors
        partial = merge if visit.at_home else SoftmaxMerge(guests)
        task.attend(partial, guests, mine, visit.queries)
        if not visit.at_home:
            home.start(*visit.results(partial.result(), merge))
    home.finish()
    out, lse = merge.result()
    return out, Saved(q, k, v, out, lse)


def backward(dout: Tensor, saved: Saved, task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """dout [s b h d] -> dq, dk, dv.

    Queries, their output gradients, lse and delta travel as the queries did; each rank's part of dq goes straight home
    and is added in float32, while dk and dv never leave their owner.
    """
    dq, dk, dv = Sum(saved.q), Sum(saved.k), Sum(saved.v)
    mine, home = Block(task.fabric.rank, 0, saved.k, saved.v), Returns(task.fabric)
    for visit in _visits([saved.q, dout, saved.lse, delta(saved.out, dout)], task):
        q, dguests, lse, row_delta = visit.tensors
        partial = dq if visit.at_home else Sum(q)
        guests = saved if visit.at_home else Saved(q, saved.k, saved.v, stand_in(row_delta, dguests), lse)
        task.attend_backward(partial, dk, dv, dguests, guests, mine, visit.queries)
        if not visit.at_home:
            home.start(*visit.results([partial.result()], dq))
    home.finish()
    return dq.result(), dk.result(), dv.result()


def _visits(tensors: list[Tensor], task: Task) -> Iterator[Visit]:
    """All queries that come by, this rank's own first; the next ones are in flight during the body."""
    fabric, size, seen_by = task.fabric, task.fabric.size, task.mask.mirrored
    way = route(task.runs, seen_by)
    ahead, behind = (fabric.rank + way.turn) % size, (fabric.rank - way.turn) % size
    first = 0
    for hop in range(size):
        owner, host = (fabric.rank - way.turn * hop) % size, (fabric.rank + way.turn * hop) % size
        needed = seen(task.mine, task.runs[owner], seen_by)
        visit = Visit(Queries(owner, needed, first), tensors, host, seen(task.runs[host], task.mine, seen_by), hop == 0)
        if hop == size - 1:
            yield visit
            return
        onward, due = way.carried[owner][hop + 1], way.carried[(owner - way.turn) % size][hop + 1]
        leaving = [tensor[max(0, onward.start - first) : max(0, onward.stop - first)] for tensor in tensors]
        arriving = empty_like(leaving, due.stop - due.start)
        transfer = exchange(fabric, leaving, ahead, arriving, behind)
        yield visit
        transfer.wait()
        tensors, first = arriving, due.start
