"""All-gather of keys and values, as in Llama 3: every rank sees the whole sequence's K and V at once.

Source: Llama Team 2024, arXiv:2407.21783, section 3.3.2. Traffic, memory: `BACKENDS` in `megatron_cp.context`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_cp.context.layouts import gathered, length
from megatron_cp.context.merge import SoftmaxMerge, Sum
from megatron_cp.context.task import Block, Saved, Task
from megatron_cp.context.tiles import seen


def forward(q: Tensor, k: Tensor, v: Tensor, task: Task) -> tuple[Tensor, Saved]:
    """q [s b h d], k and v [s b g d] of this rank -> out [s b h d]; 2 p s b g d elements are alive meanwhile."""
    merge = SoftmaxMerge(q)
    task.attend(merge, q, _whole(k, v, task))
    out, lse = merge.result()
    return out, Saved(q, k, v, out, lse)


def backward(dout: Tensor, saved: Saved, task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """dout [s b h d] -> dq, dk, dv; K and V are gathered again, dK and dV are added up in float32 by the owner."""
    whole = _whole(saved.k, saved.v, task)
    dq, dk, dv = Sum(saved.q), Sum(whole.k), Sum(whole.v)
    task.attend_backward(dq, dk, dv, dout, saved, whole)
    return dq.result(), *_to_owners(dk.result(), dv.result(), task)


def _whole(k: Tensor, v: Tensor, task: Task) -> Block:
    """K and V of all ranks in sequence order: [S b g d] each."""
    runs, places = gathered(task.runs)
    pieces = task.fabric.all_gather(torch.stack((k, v), dim=1))
    whole_k, whole_v = (k.new_empty((length(runs), *k.shape[1:])) for _ in range(2))
    for rank, local, where in places:
        # p s (k v) b g d -> S b g d, twice
        whole_k[where], whole_v[where] = pieces[rank, local].unbind(1)
    return Block(task.fabric.rank, 0, whole_k, whole_v, runs)


def _to_owners(dk: Tensor, dv: Tensor, task: Task) -> tuple[Tensor, Tensor]:
    """Each owner's sum of what the ranks computed for its tokens; tokens that a rank's queries did not see stay."""
    fabric, parts = task.fabric, (dk.contiguous(), dv.contiguous())
    others = [rank for rank in range(fabric.size) if rank != fabric.rank]
    totals = tuple(Sum(part[: length(task.mine)]) for part in parts)
    for local, whole in _seen_by(fabric.rank, fabric.rank, task):
        for total, part in zip(totals, parts, strict=True):
            total.add(local, part[whole])
    sends = [
        (part[whole], owner) for owner in others for _, whole in _seen_by(fabric.rank, owner, task) for part in parts
    ]
    arriving = [
        (total, local, dk.new_empty((local.stop - local.start, *dk.shape[1:])), worker)
        for worker in others
        for local, _ in _seen_by(worker, fabric.rank, task)
        for total in totals
    ]
    fabric.exchange(sends, [(buffer, worker) for _, _, buffer, worker in arriving]).wait()
    for total, local, buffer, _ in arriving:
        total.add(local, buffer)
    return totals[0].result(), totals[1].result()


def _seen_by(worker: int, owner: int, task: Task) -> Iterator[tuple[slice, slice]]:
    """Stretches of `owner`'s tokens that `worker`'s queries see, as local tokens of the owner and of the whole."""
    whole, places = gathered(task.runs)
    reach = seen(task.runs[worker], whole, task.mask)
    for rank, local, where in places:
        first, last = max(where.start, reach.start), min(where.stop, reach.stop)
        if rank == owner and first < last:
            shift = local.start - where.start
            yield slice(first + shift, last + shift), slice(first, last)
