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

from megatron_cp.context.algorithms.ring import Route, route
from megatron_cp.context.delta import delta, stand_in
from megatron_cp.context.merge import SoftmaxMerge, Sum
from megatron_cp.context.returns import Returns, Visit, empty_like, exchange
from megatron_cp.context.task import Block, Queries, Saved, Task


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
    fabric, me, size = task.fabric, task.fabric.rank, task.fabric.size
    way = route(task.runs, task.mask.mirrored)
    first = 0
    for hop in range(size):
        owner, host, following = ((me + way.turn * hops) % size for hops in (-hop, hop, -hop - 1))
        visit = Visit(Queries(owner, way.wanted[owner][me], first), tensors, host, way.wanted[me][host], hop == 0)
        onward, due = _carried(way, owner, hop + 1), _carried(way, following, hop + 1)
        leaving = [tensor[max(0, onward.start - first) : max(0, onward.stop - first)] for tensor in tensors]
        tensors, first = empty_like(leaving, due.stop - due.start), due.start
        transfer = exchange(fabric, leaving, (me + way.turn) % size, tensors, (me - way.turn) % size)
        yield visit
        transfer.wait()


def _carried(way: Route, owner: int, hop: int) -> slice:
    """What travels of the owner's queries on this hop; there is none after the last."""
    return way.carried[owner][hop] if hop < len(way.carried) else slice(0, 0)
