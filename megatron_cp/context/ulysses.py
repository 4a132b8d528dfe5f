"""DeepSpeed-Ulysses: heads for tokens and back; in between every rank attends the whole sequence with its own heads.

Source: Jacobs et al. 2023, arXiv:2309.14509. Traffic: `BACKENDS` in `megatron_cp.context`.
"""

from torch import Tensor

from megatron_cp.comm import SingleFabric
from megatron_cp.context import ring
from megatron_cp.context.heads import Swap, deal
from megatron_cp.context.task import Saved, Task


def forward(q: Tensor, k: Tensor, v: Tensor, task: Task) -> tuple[Tensor, Saved]:
    """q [s b h d], k and v [s b g d] of this rank -> out [s b h d].

    A KV head that query heads of several ranks need goes to each of them; heads that p does not divide are dealt
    unevenly. Raises ValueError for more ranks than query heads.
    """
    return forward_between(q, k, v, *split(task))


def backward(dout: Tensor, saved: Saved, task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """dout [s b h d] -> dq, dk, dv; the exchanges of the forward pass the other way round."""
    return backward_between(dout, saved, *split(task))


def forward_between(q: Tensor, k: Tensor, v: Tensor, swap: Swap, inside: Task) -> tuple[Tensor, Saved]:
    """Attention of my heads over the tokens of `inside`, between the two exchanges."""
    q, k, v = swap.to_heads(q, k, v)
    out, saved = ring.forward(q, k, v, inside)
    return swap.to_tokens([out], [swap.hands.q])[0], saved


def backward_between(dout: Tensor, saved: Saved, swap: Swap, inside: Task) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `forward_between`."""
    (dout,) = swap.to_heads(dout)
    dq, dk, dv = ring.backward(dout, saved, inside)
    dq, dk, dv = swap.to_tokens([dq, dk, dv], [swap.hands.q, swap.hands.kv, swap.hands.kv])
    return dq, dk, dv


def split(task: Task) -> tuple[Swap, Task]:
    """All ranks exchange heads; what remains is attention on one rank."""
    swap = Swap(task.fabric, task.runs, deal(*task.heads, task.fabric.size))
    return swap, task.on(SingleFabric(), (swap.whole,), swap.kernel(task.kernel))
