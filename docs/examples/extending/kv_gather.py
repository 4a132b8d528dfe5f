"""All-gather of keys and values, then attention of this rank's queries over the whole sequence.

Written for clarity: every rank holds K and V of all tokens meanwhile. Backend `all-gather` does the same in groups of
KV heads and sends only what the mask shows.
"""

from torch import Tensor

from megatron_cp.context.merge import SoftmaxMerge, Sum
from megatron_cp.context.task import Block, Saved, Task


def forward(q: Tensor, k: Tensor, v: Tensor, task: Task) -> tuple[Tensor, Saved]:
    """Attend: q [s b h d], k and v [s b g d] of this rank -> out [s b h d]."""
    merge = SoftmaxMerge(q)
    task.attend(merge, q, _gathered(k, v, task))
    out, lse = merge.result()
    return out, Saved(q, k, v, out, lse)


def backward(dout: Tensor, saved: Saved, task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate: dout [s b h d] -> dq, dk, dv; every rank's part of dK and dV is added up in float32."""
    block = _gathered(saved.k, saved.v, task)
    dq, dk, dv = Sum(saved.q), Sum(block.k), Sum(block.v)
    task.attend_backward(dq, dk, dv, dout, saved, block)
    # (p s) b g d -> p s b g d -> s b g d
    mine = [task.fabric.reduce_scatter(total.exact().unflatten(0, (task.fabric.size, -1))) for total in (dk, dv)]
    return dq.result(), mine[0].to(saved.k.dtype), mine[1].to(saved.v.dtype)


def _gathered(k: Tensor, v: Tensor, task: Task) -> Block:
    """Return K and V of all ranks, in sequence order because every rank holds a contiguous piece."""
    # s b g d -> p s b g d -> (p s) b g d
    keys, values = (task.fabric.all_gather(x).flatten(0, 1) for x in (k, v))
    return Block(task.fabric.rank, 0, keys, values, (range(len(keys)),))
