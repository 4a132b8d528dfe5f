"""Ring Attention both ways at once: the early half of every block travels up, the late half down.

On the zigzag layout a causal mask lets all ranks see a rank's early half and the ranks before it its late half, which
therefore stops at rank 0. A directed link of the ring carries at most (p - 1) U elements of K and V in a pass, half of
what it carries in a ring with one direction; in sum it is the same 2 (p - 1) U per rank, causal 3/4 of it. This pays
where each direction has a link of its own, with three ranks or more.

Source: the halves are those of zigzag in `ring`; both directions at once: Wang et al. 2024 (TokenRing),
arXiv:2412.20501, there for queries and results.
"""

from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from megatron_cp.comm import Message, Peers
from megatron_cp.context.algorithms.ring import Homecoming, Route, directed, passed_on
from megatron_cp.context.layouts import Layout, cut, length
from megatron_cp.context.masks import Mask
from megatron_cp.context.merge import SoftmaxMerge, Sum
from megatron_cp.context.task import Block, Saved, Task
from megatron_cp.context.tiles import seen


def forward(q: Tensor, k: Tensor, v: Tensor, task: Task) -> tuple[Tensor, Saved]:
    """q [s b h d], k and v [s b g d] of this rank -> out [s b h d]; two blocks are alive at a time."""
    merge, ways = SoftmaxMerge(q), up_and_down(task.runs, task.mask)
    for blocks in visits(_halves(k, v, ways, task), ways, task.fabric):
        for block in blocks:
            task.attend(merge, q, block)
    out, lse = merge.result()
    return out, Saved(q, k, v, out, lse)


def backward(dout: Tensor, saved: Saved, task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """dout [s b h d] -> dq, dk, dv; a rank's part of dK and dV of a half goes straight to the owner, rounded once."""
    dq, ways = Sum(saved.q), up_and_down(task.runs, task.mask)
    mine = _halves(saved.k, saved.v, ways, task)
    totals = [(Sum(half.k), Sum(half.v)) for half in mine]
    homes = [Homecoming(half, *total, way, task.fabric) for half, total, way in zip(mine, totals, ways, strict=True)]
    for blocks in visits(mine, ways, task.fabric):
        for block, home in zip(blocks, homes, strict=True):
            sums = home.sums(block)
            task.attend_backward(dq, *sums, dout, saved, block)
            home.start(block, *sums)
    for home in homes:
        home.finish()
    dk, dv = (torch.cat([half.result() for half in halves]) for halves in zip(*totals, strict=True))
    return dq.result(), dk, dv


def visits(blocks: Sequence[Block], ways: Sequence[Route], fabric: Peers) -> Iterator[Sequence[Block]]:
    """The halves that come by, this rank's own first; the next ones are in flight during the body, in one batch."""
    for hop in range(1, fabric.size):
        passing = [passed_on(block, way, hop) for block, way in zip(blocks, ways, strict=True)]
        sends: list[Message] = []
        recvs: list[Message] = []
        for (leaving, following), way in zip(passing, ways, strict=True):
            ahead, behind = (fabric.rank + way.turn) % fabric.size, (fabric.rank - way.turn) % fabric.size
            sends += [(tensor.contiguous(), ahead) for tensor in leaving if tensor.shape[0]]
            recvs += [(buffer, behind) for buffer in (following.k, following.v) if buffer.shape[0]]
        transfer = fabric.exchange(sends, recvs)
        yield blocks
        transfer.wait()
        blocks = [following for _, following in passing]
    yield blocks


@cache
def up_and_down(runs: Layout, mask: Mask) -> tuple[Route, Route]:
    """The ways of the early and of the late halves, over the positions of these."""
    early, late = (tuple(cut(own, half) for own in runs) for half in _split(length(runs[0])))
    up, down = (
        directed(keys, tuple(tuple(seen(queries, half, mask) for queries in runs) for half in keys), turn)
        for keys, turn in ((early, 1), (late, -1))
    )
    return up, down


def _split(tokens: int) -> tuple[slice, slice]:
    return slice(0, tokens // 2), slice(tokens // 2, tokens)


def _halves(k: Tensor, v: Tensor, ways: Sequence[Route], task: Task) -> list[Block]:
    me = task.fabric.rank
    return [Block(me, 0, k[half], v[half], way.runs[me]) for half, way in zip(_split(len(k)), ways, strict=True)]
