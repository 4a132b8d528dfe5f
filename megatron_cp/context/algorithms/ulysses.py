"""DeepSpeed-Ulysses: heads for tokens and back; in between every rank attends the whole sequence with its own heads.

A rank's heads come in two chunks, so that one chunk's exchange runs beside the other's attention, in both passes. The
chunks are KV heads with their queries; a rank with a single KV head gets it with the first chunk of its queries, and
its gradients leave with the last. The chunks together send as much as all heads at once. Where p > g
a KV head is on p / g ranks: its K and V are sent to all of them, and each sends its part of the gradients in float32.

Source: Jacobs et al. 2023, arXiv:2309.14509. Traffic: `BACKENDS` in `megatron_cp.context`.
"""

import torch
from torch import Tensor

from megatron_cp.comm import SingleFabric
from megatron_cp.context import sinks
from megatron_cp.context.algorithms import ring
from megatron_cp.context.heads import HeadChunk, HeadExchange, HeadReturns, cut, share_heads
from megatron_cp.context.merge import Sum
from megatron_cp.context.task import Saved, Task


def forward(q: Tensor, k: Tensor, v: Tensor, task: Task) -> tuple[Tensor, tuple[Saved, ...]]:
    """Attend: q [s b h d], k and v [s b g d] of this rank -> out [s b h d].

    A KV head that query heads of several ranks need goes to each of them; heads that p does not divide are shared
    unevenly. Raises ValueError for more ranks than query heads.
    """
    return forward_between(q, k, v, task, *split(task))


def backward(dout: Tensor, saved: tuple[Saved, ...], task: Task) -> tuple[Tensor, ...]:
    """Differentiate: dout [s b h d] -> dq, dk, dv; the exchanges of the forward pass in the other direction."""
    return backward_between(dout, saved, task, *split(task))


def forward_between(
    q: Tensor, k: Tensor, v: Tensor, task: Task, swap: HeadExchange, inside: Task
) -> tuple[Tensor, tuple[Saved, ...]]:
    """Attend this rank's heads over the tokens of `inside`, between the two exchanges; save one `Saved` per chunk."""
    chunks, to_tokens = _chunks(swap, inside), HeadReturns(swap, [swap.shares.q])
    # 1. all-to-all of q, k and v, heads for tokens: the next chunk of heads is in flight during the body
    arrivals = swap.visits([q, k, v], [(chunk.shares.q, chunk.arriving, chunk.arriving) for chunk in chunks])
    saved: list[Saved] = []
    for chunk, (q_i, k_i, v_i) in zip(chunks, arrivals, strict=True):
        if not k_i.shape[2]:
            k_i, v_i = saved[-1].k, saved[-1].v
        # 2. attend this rank's heads over the whole sequence; on more axes than one, by a ring over the rest of it
        out, saved_i = ring.forward(q_i, k_i, v_i, _on_chunk(chunk, task, swap, inside))
        if task.sink is not None:
            out, lse = sinks.merged(out, saved_i.lse, task.sink[..., chunk.shares.q[swap.fabric.rank]])
            saved_i = saved_i._replace(out=out, lse=lse)
        # 3. all-to-all of out, tokens for heads
        to_tokens.start([out], [chunk.shares.q])
        saved.append(saved_i)
    return to_tokens.results()[0], tuple(saved)


def backward_between(
    dout: Tensor, saved: tuple[Saved, ...], task: Task, swap: HeadExchange, inside: Task
) -> tuple[Tensor, ...]:
    """Differentiate `forward_between`; a KV head's gradients add up in float32 until it has met all of its queries.

    They travel in float32 where other ranks have queries of the same KV head.
    """
    chunks, to_tokens = _chunks(swap, inside), HeadReturns(swap, [swap.shares.q, swap.shares.kv, swap.shares.kv])
    # 1. all-to-all of dout, heads for tokens
    arrivals = swap.visits([dout], [(chunk.shares.q,) for chunk in chunks])
    total_k = total_v = None
    # of this rank's heads only
    dsink = [] if task.sink is None else [torch.zeros_like(task.sink)]
    for chunk, (dout_i,), saved_i in zip(chunks, arrivals, saved, strict=True):
        # 2. differentiate this rank's heads over the whole sequence
        total_q, total_k, total_v = Sum(saved_i.q), total_k or Sum(saved_i.k), total_v or Sum(saved_i.v)
        here = _on_chunk(chunk, task, swap, inside)
        ring.attend_around_backward(total_q, total_k, total_v, dout_i, saved_i, here)
        if task.sink is not None:
            heads = chunk.shares.q[swap.fabric.rank]
            dsink[0][..., heads] = sinks.gradient(dout_i, saved_i.out, saved_i.lse, task.sink[..., heads])
        # 3. all-to-all of dq, dk and dv, tokens for heads
        leaving = [Sum(saved_i.k[:, :, :0]), Sum(saved_i.v[:, :, :0])]
        if chunk.leaves(swap.fabric.rank):
            leaving, total_k, total_v = [total_k, total_v], None, None
        grads = [total_q.result(), *(swap.partial(total.exact(), dout.dtype) for total in leaving)]
        to_tokens.start(grads, [chunk.shares.q, chunk.leaving, chunk.leaving])
    return *to_tokens.results(), *dsink


def split(task: Task) -> tuple[HeadExchange, Task]:
    """Exchange heads among all ranks; the ring between the exchanges has one rank."""
    swap = HeadExchange(task.fabric, task.layout, share_heads(*task.heads, task.fabric.size))
    return swap, task.on(SingleFabric(), (swap.whole,), swap.kernel(task.kernel))


def _chunks(swap: HeadExchange, inside: Task) -> tuple[HeadChunk, ...]:
    # a ring would carry a KV head once per chunk of its queries
    return cut(swap.shares, within_group=inside.fabric.size == 1)


def _on_chunk(chunk: HeadChunk, task: Task, swap: HeadExchange, inside: Task) -> Task:
    return inside.on(inside.fabric, inside.layout, swap.kernel(task.kernel, chunk.shares))
