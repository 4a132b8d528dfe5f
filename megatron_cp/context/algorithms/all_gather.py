"""All-gather of keys and values, as in Llama 3: every rank has K and V of all tokens that its queries see at once.

It gathers one group of KV heads after the other: the next group is on its way while the current one is computed, and
in the backward pass the gradients of the one before are on their way to their owners. A rank receives only the tokens
from the first to the last one that it sees, which is why this is an exchange: a collective would bring it all of them.

Source: Llama Team 2024, arXiv:2407.21783, section 3.3.2. Traffic, memory: `BACKENDS` in `megatron_cp.context`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_cp.comm import Handle
from megatron_cp.context.heads import pieces
from megatron_cp.context.layouts import gathered
from megatron_cp.context.merge import SoftmaxMerge, Sum, accumulator_dtype
from megatron_cp.context.returns import Incoming, Outgoing, Returns, incoming_exact
from megatron_cp.context.task import Block, Saved, Task
from megatron_cp.context.tiles import seen

GROUPS = 4
"""Groups of KV heads, where there are so many; two are alive at a time."""


def forward(q: Tensor, k: Tensor, v: Tensor, task: Task) -> tuple[Tensor, Saved]:
    """Attend: q [s b h d], k and v [s b g d] of this rank -> out [s b h d].

    At most 2 / GROUPS of the gathered sequence's 2 p s b g d elements are alive meanwhile, all with one KV head.
    """
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=accumulator_dtype(q))
    # 1. gather one group of KV heads, the next one is in flight during the body
    for heads, block in _gathered_groups(q, k, v, task):
        # 2. attend the query heads of the group to all keys that they see
        merge = SoftmaxMerge(q[:, :, heads.q])
        task.attend(merge, q[:, :, heads.q], block)
        out[:, :, heads.q], lse[:, :, heads.q] = merge.result()
        # a reference would keep a third group alive beside the next two
        del block
    return out, Saved(q, k, v, out, lse)


def backward(dout: Tensor, saved: Saved, task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate: dout [s b h d] -> dq, dk, dv; K and V are gathered again, parts of dK and dV travel in float32."""
    dq, returns = torch.empty_like(saved.q), Returns(task.fabric)
    totals: list[tuple[Sum, Sum]] = []
    # 1. gather one group of KV heads, as in the forward pass
    for heads, block in _gathered_groups(saved.q, saved.k, saved.v, task):
        # 2. differentiate the query heads of the group
        q, out, lse, dout_i = (x[:, :, heads.q] for x in (saved.q, saved.out, saved.lse, dout))
        total_q, total_k, total_v = Sum(q), Sum(block.k), Sum(block.v)
        here = Saved(q, block.k, block.v, out, lse)
        task.attend_backward(total_q, total_k, total_v, dout_i, here, block)
        dq[:, :, heads.q] = total_q.result()
        # 3. return the gradients of the gathered keys and values to their owners
        mine = Sum(saved.k[:, :, heads.kv]), Sum(saved.v[:, :, heads.kv])
        returns.start(*_to_owners(block._replace(k=total_k.exact(), v=total_v.exact()), mine, task))
        totals.append(mine)
        del block, here, total_k, total_v
    returns.finish()
    dk, dv = (torch.cat([total.result() for total in parts], 2) for parts in zip(*totals, strict=True))
    return dq, dk, dv


class HeadGroup(NamedTuple):
    """KV heads, and the query heads that they serve."""

    q: slice
    kv: slice


def groups(heads: int, kv_heads: int) -> list[HeadGroup]:
    """Cut the heads into at most GROUPS groups of whole KV heads."""
    serves = heads // kv_heads
    return [
        HeadGroup(slice(part.start * serves, part.stop * serves), part)
        for part in pieces(slice(0, kv_heads), min(GROUPS, kv_heads))
    ]


def _gathered_groups(q: Tensor, k: Tensor, v: Tensor, task: Task) -> Iterator[tuple[HeadGroup, Block]]:
    """Yield each group with the K and V that this rank's queries see; the next one is in flight during the body."""
    parts = groups(q.shape[2], k.shape[2])
    arriving = _gather(k, v, parts[0], task)
    for part, after in zip(parts, [*parts[1:], None], strict=True):
        block, transfer = arriving
        transfer.wait()
        if after is not None:
            arriving = _gather(k, v, after, task)
        yield part, block


def _gather(k: Tensor, v: Tensor, heads: HeadGroup, task: Task) -> tuple[Block, Handle]:
    """Start to gather K and V of these heads for all tokens that this rank sees, in sequence order."""
    me, (whole, _) = task.fabric.rank, gathered(task.layout)
    reach = seen(task.mine, whole, task.mask)
    # s b (k v) d, so that K and V of a stretch are one message
    mine = torch.cat([k[:, :, heads.kv], v[:, :, heads.kv]], 2)
    buffer = mine.new_empty((reach.stop - reach.start, *mine.shape[1:]))
    sends, recvs = [], []
    for rank in range(task.fabric.size):
        if rank != me:
            sends += [(mine[local], rank) for local, _ in _seen_by(rank, me, task)]
        for local, where in _seen_by(me, rank, task):
            here = buffer[where.start - reach.start : where.stop - reach.start]
            if rank == me:
                here.copy_(mine[local])
            else:
                recvs.append((here, rank))
    transfer = task.fabric.exchange(sends, recvs)
    k, v = buffer.chunk(2, dim=2)
    return Block(me, reach.start, k, v, whole), transfer


def _to_owners(grads: Block, mine: tuple[Sum, Sum], task: Task) -> tuple[list[Outgoing], list[Incoming]]:
    """Return each owner its part of the gradients, and add this rank's own part at once."""
    me, outgoing, expected = task.fabric.rank, [], []
    for rank in range(task.fabric.size):
        for local, where in _seen_by(me, rank, task):
            parts = grads.part(where)
            if rank != me:
                outgoing.append(Outgoing(rank, parts))
                continue
            for total, part in zip(mine, parts, strict=True):
                # a total that took the part over would keep the whole buffer alive
                total.exact()[local] += part
        if rank != me:
            stretches = [local for local, _ in _seen_by(rank, me, task)]
            expected += [item for local in stretches for item in incoming_exact(rank, local, *mine)]
    return outgoing, expected


def _seen_by(worker: int, owner: int, task: Task) -> Iterator[tuple[slice, slice]]:
    """Yield the stretches of `owner`'s tokens that `worker`'s queries see, as tokens of the owner and of the whole."""
    whole, places = gathered(task.layout)
    reach = seen(task.layout[worker], whole, task.mask)
    for rank, local, where in places:
        first, last = max(where.start, reach.start), min(where.stop, reach.stop)
        if rank == owner and first < last:
            shift = local.start - where.start
            yield slice(first + shift, last + shift), slice(first, last)
