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
from megatron_cp.context import cache_sizes
from megatron_cp.context.heads import pieces
from megatron_cp.context.layouts import Layout, Place, Runs, gathered
from megatron_cp.context.masks import AnyMask
from megatron_cp.context.merge import SoftmaxMerge, Sum, accumulator_dtype
from megatron_cp.context.remembered import remembered
from megatron_cp.context.returns import Incoming, Outgoing, Returns
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
    for heads, block in _gathered_groups(q, k, v, _view_of(task), task):
        # 2. attend the query heads of the group to all keys that they see
        merge = SoftmaxMerge(q[:, :, heads.q])
        task.attend(merge, q[:, :, heads.q], block)
        out[:, :, heads.q], lse[:, :, heads.q] = merge.result()
        # a reference would keep a third group alive beside the next two
        del block
    return out, Saved(q, k, v, out, lse)


def backward(dout: Tensor, saved: Saved, task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate: dout [s b h d] -> dq, dk, dv; K and V are gathered again, parts of dK and dV travel in float32."""
    dq, returns, view = torch.empty_like(saved.q), Returns(task.fabric), _view_of(task)
    totals: list[Sum] = []
    # 1. gather one group of KV heads, as in the forward pass
    for heads, block in _gathered_groups(saved.q, saved.k, saved.v, view, task):
        # 2. differentiate the query heads of the group
        q, out, lse, dout_i = (x[:, :, heads.q] for x in (saved.q, saved.out, saved.lse, dout))
        # s b (k v) d, so that dK and dV of a stretch are one message
        grads = _zeros(len(block.k), saved.k, heads)
        total_q, total_k, total_v = Sum(q), *map(Sum, (block.k, block.v), grads.chunk(2, dim=2))
        task.attend_backward(total_q, total_k, total_v, dout_i, Saved(q, block.k, block.v, out, lse), block)
        dq[:, :, heads.q] = total_q.result()
        # what has not been added yet is added to `grads`
        total_k.exact(), total_v.exact()
        # 3. return the gradients of the gathered keys and values to their owners
        mine = _zeros(len(saved.k), saved.k, heads)
        totals.append(Sum(mine, mine))
        returns.start(*_to_owners(grads, totals[-1], view, task))
        del block, grads, total_k, total_v
    returns.finish()
    dk, dv = zip(*(total.result().chunk(2, dim=2) for total in totals), strict=True)
    return dq, torch.cat(dk, 2).to(dq.dtype), torch.cat(dv, 2).to(dq.dtype)


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


class View(NamedTuple):
    """The stretch of the gathered sequence that a rank's queries see, and the messages that bring it.

    runs:  positions of the whole sequence
    reach: the stretch of it that the rank holds
    sizes: lengths of the parts that the stretch is put together from, each of one rank's tokens
    parts: whose tokens these are, and which of its local tokens
    sends: ranks that see this rank's tokens, and which of them, in the order of the receivers' parts
    stretches: these tokens, each stretch once
    """

    runs: Runs
    reach: slice
    sizes: tuple[int, ...]
    parts: tuple[tuple[int, slice], ...]
    sends: tuple[tuple[int, slice], ...]
    stretches: tuple[slice, ...]


def _view_of(task: Task) -> View:
    return view_of(task.layout, task.mask, task.fabric.rank)


@remembered(cache_sizes.GROUPS)
def view_of(layout: Layout, mask: AnyMask, me: int) -> View:
    """Return the view of rank `me`."""
    whole, places = gathered(layout)
    reach = [seen(runs, whole, mask) for runs in layout]
    parts = [(part.rank, part.local) for place in places if (part := _overlap(place, reach[me]))]
    mine = [place for place in places if place.rank == me]
    sends = [
        (rank, part.local)
        for rank in range(len(layout))
        for place in mine
        if rank != me and (part := _overlap(place, reach[rank]))
    ]
    sizes = tuple(local.stop - local.start for _, local in parts)
    return View(whole, reach[me], sizes, tuple(parts), tuple(sends), tuple({local for _, local in sends}))


def _overlap(place: Place, reach: slice) -> Place | None:
    """Return the part of a rank's stretch that lies in this stretch of the whole, if there is one."""
    first, last = max(place.whole.start, reach.start), min(place.whole.stop, reach.stop)
    if first >= last:
        return None
    shift = place.local.start - place.whole.start
    return Place(place.rank, slice(first + shift, last + shift), slice(first, last))


def _gathered_groups(q: Tensor, k: Tensor, v: Tensor, view: View, task: Task) -> Iterator[tuple[HeadGroup, Block]]:
    """Yield each group with the K and V that this rank's queries see; the next one is in flight during the body."""
    parts = groups(q.shape[2], k.shape[2])
    arriving = _gather(k, v, parts[0], view, task)
    for part, after in zip(parts, [*parts[1:], None], strict=True):
        block, transfer = arriving
        transfer.wait()
        if after is not None:
            arriving = _gather(k, v, after, view, task)
        yield part, block


def _gather(k: Tensor, v: Tensor, heads: HeadGroup, view: View, task: Task) -> tuple[Block, Handle]:
    """Start to gather K and V of these heads for all tokens that this rank sees, in sequence order."""
    me = task.fabric.rank
    # s b (k v) d, so that K and V of a stretch are one message
    mine = torch.cat([k[:, :, heads.kv], v[:, :, heads.kv]], 2)
    buffer = mine.new_empty((view.reach.stop - view.reach.start, *mine.shape[1:]))
    arriving = list(zip(view.parts, buffer.split(view.sizes), strict=True))
    for (rank, local), here in arriving:
        if rank == me:
            here.copy_(mine[local])
    # most ranks see the same stretch
    leaving = {local: mine[local] for local in view.stretches}
    sends = [(leaving[local], rank) for rank, local in view.sends]
    transfer = task.fabric.exchange(sends, [(here, rank) for (rank, _), here in arriving if rank != me])
    k, v = buffer.chunk(2, dim=2)
    return Block(me, view.reach.start, k, v, view.runs), transfer


def _to_owners(grads: Tensor, mine: Sum, view: View, task: Task) -> tuple[list[Outgoing], list[Incoming]]:
    """Return each owner its part of the gradients, and add this rank's own part at once."""
    outgoing = []
    for (rank, local), part in zip(view.parts, grads.split(view.sizes), strict=True):
        if rank == task.fabric.rank:
            mine.add(local, part)
        else:
            outgoing.append(Outgoing(rank, [part]))
    sizes = [local.stop - local.start for _, local in view.sends]
    buffers = grads.new_empty((sum(sizes), *grads.shape[1:])).split(sizes) if sizes else ()
    arriving = zip(view.sends, buffers, strict=True)
    return outgoing, [Incoming(rank, local, [buffer], mine.add) for (rank, local), buffer in arriving]


def _zeros(tokens: int, like: Tensor, heads: HeadGroup) -> Tensor:
    """Return zeros for the sums of dK and dV of these heads, s b (k v) d."""
    shape = (tokens, like.shape[1], 2 * (heads.kv.stop - heads.kv.start), like.shape[3])
    return torch.zeros(shape, dtype=accumulator_dtype(like), device=like.device)
