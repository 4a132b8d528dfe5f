"""Ring Attention both ways at once: the early half of every block travels up, the late half down.

On the zigzag layout a causal mask lets all ranks see a rank's early half and the ranks before it its late half, which
therefore stops at rank 0. A directed link of the ring carries at most (p - 1) U elements of K and V in a pass, half of
what it carries in a ring with one direction; in sum it is the same 2 (p - 1) U per rank, causal 3/4 of it. This pays
where each direction has a link of its own, with three ranks or more.

Source: the halves are those of zigzag in `ring`; both directions at once: Wang et al. 2024 (TokenRing),
arXiv:2412.20501, there for queries and results.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_cp.context import cache_sizes
from megatron_cp.context.algorithms.ring import GradientReturns, directed
from megatron_cp.context.circulate import Route, circulate_blocks
from megatron_cp.context.layouts import Layout, cut, length
from megatron_cp.context.masks import AnyMask
from megatron_cp.context.merge import SoftmaxMerge, Sum
from megatron_cp.context.remembered import remembered
from megatron_cp.context.task import Block, Saved, Task
from megatron_cp.context.tiles import seen


def forward(q: Tensor, k: Tensor, v: Tensor, task: Task) -> tuple[Tensor, Saved]:
    """Attend: q [s b h d], k and v [s b g d] of this rank -> out [s b h d]; two blocks are alive at a time."""
    merge, ways = SoftmaxMerge(q, v.shape[3]), up_and_down(task.layout, task.mask)
    # 1. pass the early half on to the next rank and the late half to the one before, receive the next two meanwhile
    for blocks in circulate_blocks(_halves(k, v, ways, task), ways, task.fabric):
        # 2. attend to both halves at hand
        for block in blocks:
            task.attend(merge, q, block)
        # a reference would keep a third block alive beside the next two
        del block, blocks
    out, lse = merge.result()
    return out, Saved(q, k, v, out, lse)


def backward(dout: Tensor, saved: Saved, task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate: dout [s b h d] -> dq, dk, dv; parts of dK and dV go straight to the owner, in float32."""
    dq, ways = Sum(saved.q), up_and_down(task.layout, task.mask)
    mine = _halves(saved.k, saved.v, ways, task)
    totals = [(Sum(half.k), Sum(half.v)) for half in mine]
    both = [
        GradientReturns(half, *total, way, task.fabric) for half, total, way in zip(mine, totals, ways, strict=True)
    ]
    # 1. pass both halves on as in the forward pass
    for blocks in circulate_blocks(mine, ways, task.fabric):
        for block, returns in zip(blocks, both, strict=True):
            # 2. add to dq here, and to this rank's part of the half's dk and dv
            sums = returns.sums(block)
            task.attend_backward(dq, *sums, dout, saved, block)
            # 3. return that part to the owner of the half
            returns.start(block, *sums)
    for returns in both:
        returns.finish()
    dk, dv = (torch.cat([half.result() for half in halves]) for halves in zip(*totals, strict=True))
    return dq.result(), dk, dv


@remembered(cache_sizes.LAYOUTS)
def up_and_down(layout: Layout, mask: AnyMask) -> tuple[Route, Route]:
    """Return the routes of the early and of the late halves, over the positions of these halves."""
    early, late = (tuple(cut(runs, half) for runs in layout) for half in _split(length(layout[0])))
    up, down = (
        directed(keys, tuple(tuple(seen(queries, half, mask) for queries in layout) for half in keys), turn)
        for keys, turn in ((early, 1), (late, -1))
    )
    return up, down


def _split(tokens: int) -> tuple[slice, slice]:
    return slice(0, tokens // 2), slice(tokens // 2, tokens)


def _halves(k: Tensor, v: Tensor, ways: Sequence[Route], task: Task) -> list[Block]:
    me = task.fabric.rank
    return [Block(me, 0, k[half], v[half], way.layout[me]) for half, way in zip(_split(len(k)), ways, strict=True)]
