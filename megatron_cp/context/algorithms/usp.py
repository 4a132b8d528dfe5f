"""USP: Ulysses inside, Ring Attention across (or the other way round), on the two axes of a grid of ranks.

Heads come in chunks as in `ulysses`, with a ring for each, if every rank gets more than one KV head.

Source: Fang and Zhao 2024, arXiv:2405.07719; head-first and context-first placement: Gu et al. 2024 (LoongTrain),
arXiv:2406.18485, section 4. Traffic, memory: `BACKENDS` in `megatron_cp.context`.
"""

from torch import Tensor

from megatron_cp.context.algorithms.ulysses import backward_between, forward_between
from megatron_cp.context.heads import HeadExchange, share_heads
from megatron_cp.context.layouts import Layout, gathered, of_ranks
from megatron_cp.context.task import Saved, Task


def forward(q: Tensor, k: Tensor, v: Tensor, task: Task) -> tuple[Tensor, tuple[Saved, ...]]:
    """Attend: q [s b h d], k and v [s b g d] of this rank -> out [s b h d].

    Raises ValueError for more ranks on the heads axis than query heads.
    """
    # 1. all-to-all on the heads axis, 2. ring on the other axis, 3. all-to-all back: the loop of `ulysses`
    return forward_between(q, k, v, task, *split(task))


def backward(dout: Tensor, saved: tuple[Saved, ...], task: Task) -> tuple[Tensor, ...]:
    """Differentiate: dout [s b h d] -> dq, dk, dv."""
    return backward_between(dout, saved, task, *split(task))


def split(task: Task) -> tuple[HeadExchange, Task]:
    """Exchange heads along the heads axis; the ranks along the other axis are a ring over the groups' tokens."""
    assert task.axes
    grid, heads, ring = task.axes.grid, task.axes.heads, task.axes.ring
    me, fabric = task.fabric.rank, task.axes.fabric(heads)

    def tokens_of_group(rank: int) -> Layout:
        return of_ranks(task.layout, tuple(grid.members(heads, rank)))

    swap = HeadExchange(fabric, tokens_of_group(me), share_heads(*task.heads, fabric.size))
    layout = tuple(gathered(tokens_of_group(rank))[0] for rank in grid.members(ring, me))
    return swap, task.on(task.axes.fabric(ring), layout, swap.kernel(task.kernel))
