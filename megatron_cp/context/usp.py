"""USP: Ulysses inside, Ring Attention across (or the other way round), on the two axes of a grid of ranks.

Source: Fang and Zhao 2024, arXiv:2405.07719; head-first and context-first placement: Gu et al. 2024 (LoongTrain),
arXiv:2406.18485, section 4. Traffic, memory: `BACKENDS` in `megatron_cp.context`.
"""

from torch import Tensor

from megatron_cp.context import ring
from megatron_cp.context.layouts import gathered
from megatron_cp.context.task import Saved, Task
from megatron_cp.context.ulysses import Swap, deal


def forward(q: Tensor, k: Tensor, v: Tensor, task: Task) -> tuple[Tensor, Saved]:
    """q [s b h d], k and v [s b g d] of this rank -> out [s b h d]."""
    swap = _swap(task)
    out, saved = ring.forward(*swap.to_heads(q, k, v), _ring(task, swap))
    return swap.to_tokens([out], [swap.hands.q])[0], saved


def backward(dout: Tensor, saved: Saved, task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """dout [s b h d] -> dq, dk, dv."""
    swap = _swap(task)
    grads = ring.backward(swap.to_heads(dout)[0], saved, _ring(task, swap))
    return swap.gradients_to_tokens(*grads)


def _swap(task: Task) -> Swap:
    """Heads for tokens with the ranks along the heads axis."""
    assert task.axes
    grid, axis = task.axes.grid, task.axes.heads
    fabric = task.axes.fabric(axis)
    members = tuple(task.runs[rank] for rank in grid.members(axis, task.fabric.rank))
    return Swap(fabric, members, deal(*task.heads, fabric.size))


def _ring(task: Task, swap: Swap) -> Task:
    """The ring along the other axis, over the tokens that each group of the heads axis holds together."""
    assert task.axes
    grid, heads, around = task.axes.grid, task.axes.heads, task.axes.ring
    runs = tuple(
        gathered(tuple(task.runs[member] for member in grid.members(heads, rank)))[0]
        for rank in grid.members(around, task.fabric.rank)
    )
    return task.on(task.axes.fabric(around), runs, swap.kernel(task.kernel))
