"""DeepSpeed-Ulysses: heads for tokens and back; in between every rank attends the whole sequence with its own heads.

Source: Jacobs et al. 2023, arXiv:2309.14509. Traffic, memory: `BACKENDS` in `megatron_cp.context`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_cp.comm import Fabric, SingleFabric
from megatron_cp.context import ring
from megatron_cp.context.layouts import Layout, Place, gathered
from megatron_cp.context.merge import Sum
from megatron_cp.context.task import Saved, Task
from megatron_cp.kernels import Kernel


def forward(q: Tensor, k: Tensor, v: Tensor, task: Task) -> tuple[Tensor, Saved]:
    """q [s b h d], k and v [s b g d] of this rank -> out [s b h d]; sends (p-1)/p of q, k, v and out.

    A KV head that several ranks' query heads need is sent to each of them; heads that p does not divide are dealt unevenly.
    """
    swap = Swap(task.fabric, task.runs, deal(*task.heads, task.fabric.size))
    out, saved = ring.forward(*swap.to_heads(q, k, v), _local(task, swap))
    return swap.to_tokens([out], [swap.hands.q])[0], saved


def backward(dout: Tensor, saved: Saved, task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """dout [s b h d] -> dq, dk, dv; the exchanges of the forward pass the other way round."""
    swap = Swap(task.fabric, task.runs, deal(*task.heads, task.fabric.size))
    grads = ring.backward(swap.to_heads(dout)[0], saved, _local(task, swap))
    return swap.gradients_to_tokens(*grads)


def _local(task: Task, swap: "Swap") -> Task:
    return task.on(SingleFabric(), (swap.whole,), swap.kernel(task.kernel))


class Hands(NamedTuple):
    """Which query heads, and which KV heads these need, every rank is dealt."""

    q: tuple[slice, ...]
    kv: tuple[slice, ...]


@cache
def deal(heads: int, kv_heads: int, ranks: int) -> Hands:
    """Query heads in order, one more for the first `heads % ranks` ranks; raises ValueError when some rank would get none."""
    if ranks > heads:
        raise ValueError(
            f"{ranks} ranks cannot share {heads} query heads; use a head-parallel degree of at most {heads} or backend 'zigzag'"
        )
    few, more = divmod(heads, ranks)
    starts = [rank * few + min(rank, more) for rank in range(ranks + 1)]
    group = heads // kv_heads
    q = tuple(slice(start, stop) for start, stop in zip(starts, starts[1:], strict=False))
    return Hands(q, tuple(slice(hand.start // group, (hand.stop - 1) // group + 1) for hand in q))


@dataclass(frozen=True)
class Swap:
    """The exchange of heads for tokens among the ranks of a fabric."""

    fabric: Fabric
    members: Layout
    hands: Hands

    @property
    def whole(self) -> tuple[range, ...]:
        return gathered(self.members)[0]

    @property
    def places(self) -> tuple[Place, ...]:
        return gathered(self.members)[1]

    def to_heads(self, *tensors: Tensor) -> list[Tensor]:
        """(q) or (q, k, v) with all heads of this rank's tokens -> my heads of all tokens, in sequence order, in one exchange.

        The results are views of one buffer; the stretches of each rank arrive in their place.
        """
        fabric, me = self.fabric, self.fabric.rank
        dealt = [self.hands.q, self.hands.kv, self.hands.kv][: len(tensors)]
        hands = [
            torch.cat([x[:, :, hand[rank]] for x, hand in zip(tensors, dealt, strict=True)], 2)
            for rank in range(fabric.size)
        ]
        tokens = sum(place.whole.stop - place.whole.start for place in self.places)
        buffer = tensors[0].new_empty((tokens, *hands[me].shape[1:]))
        sends, recvs = [], []
        for rank, local, where in self.places:
            if rank == me:
                buffer[where] = hands[me][local]
                sends += [(hands[peer][local], peer) for peer in range(fabric.size) if peer != me]
            else:
                recvs.append((buffer[where], rank))
        fabric.exchange(sends, recvs).wait()
        return list(buffer.split([hand[me].stop - hand[me].start for hand in dealt], dim=2))

    def to_tokens(self, tensors: Sequence[Tensor], dealt: Sequence[Sequence[slice]]) -> list[Tensor]:
        """My heads of all tokens -> all heads of this rank's tokens; heads that several ranks hold are added in float32."""
        arrived = self._collect(torch.cat(list(tensors), 2) if len(tensors) > 1 else tensors[0].contiguous(), dealt)
        results = []
        for index, tensor in enumerate(tensors):
            hands = dealt[index]
            pieces = [pieces[index] for pieces in arrived]
            if all(left.stop == right.start for left, right in zip(hands, hands[1:], strict=False)):
                results.append(torch.cat(pieces, 2))
            else:
                results.append(_add_heads(pieces, hands, tensor))
        return results

    def gradients_to_tokens(self, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of my heads -> gradients of this rank's tokens."""
        dq, dk, dv = self.to_tokens([dq, dk, dv], [self.hands.q, self.hands.kv, self.hands.kv])
        return dq, dk, dv

    def kernel(self, kernel: Kernel) -> Kernel:
        """The kernel for my hand: called once per stretch of KV heads that serve equally many of my query heads."""
        group = _group_size(self.hands)
        parts = _parts(self.hands.q[self.fabric.rank], self.hands.kv[self.fabric.rank], group)
        return kernel if len(parts) == 1 else _UnevenHeads(kernel, parts)

    def _collect(self, mine: Tensor, dealt: Sequence[Sequence[slice]]) -> list[list[Tensor]]:
        """Per rank, its heads of my tokens, one tensor per deal."""
        fabric, me = self.fabric, self.fabric.rank
        sizes = [[hands[rank].stop - hands[rank].start for hands in dealt] for rank in range(fabric.size)]
        tokens = sum(local.stop - local.start for rank, local, _ in self.places if rank == me)
        shape = (tokens, mine.shape[1])
        arrived = [mine.new_empty((*shape, sum(sizes[rank]), mine.shape[3])) for rank in range(fabric.size)]
        sends, recvs = [], []
        for rank, local, where in self.places:
            if rank != me:
                sends.append((mine[where], rank))
                continue
            arrived[me][local] = mine[where]
            recvs += [(arrived[peer][local], peer) for peer in range(fabric.size) if peer != me]
        fabric.exchange(sends, recvs).wait()
        return [list(tensor.split(sizes[rank], dim=2)) for rank, tensor in enumerate(arrived)]


def _add_heads(pieces: Sequence[Tensor], hands: Sequence[slice], like: Tensor) -> Tensor:
    heads = hands[-1].stop
    total = Sum(like.new_empty((heads, *pieces[0].shape[:2], pieces[0].shape[3])))
    for piece, hand in zip(pieces, hands, strict=True):
        # s b g d -> g s b d
        total.add(hand, piece.movedim(2, 0))
    return total.result().movedim(0, 2)


class _Part(NamedTuple):
    q: slice
    kv: slice


class _UnevenHeads:
    """A kernel over heads of which some KV heads serve more query heads than others; nothing is repeated."""

    def __init__(self, kernel: Kernel, parts: Sequence[_Part]) -> None:
        self.name = kernel.name
        self._kernel, self._parts = kernel, parts

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        results = [
            self._kernel.forward(q[:, :, part.q], k[:, :, part.kv], v[:, :, part.kv], scale=scale, causal=causal)
            for part in self._parts
        ]
        outs, lses = zip(*results, strict=True)
        return torch.cat(outs, 2), torch.cat(lses, 2)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        results = [
            self._kernel.backward(
                *(x[:, :, heads] for x, heads in zip((dout, q, k, v, out), (a, a, c, c, a), strict=True)),
                lse[:, :, a],
                scale=scale,
                causal=causal,
            )
            for a, c in self._parts
        ]
        dq, dk, dv = (torch.cat(parts, 2) for parts in zip(*results, strict=True))
        return dq, dk, dv


def _group_size(hands: Hands) -> int:
    return hands.q[-1].stop // hands.kv[-1].stop


def _parts(q: slice, kv: slice, group: int) -> list[_Part]:
    """Stretches of KV heads that each serve the same number of the query heads in `q`, relative to the hand."""
    parts: list[_Part] = []
    for head in range(kv.start, kv.stop):
        served = slice(max(q.start, head * group) - q.start, min(q.stop, (head + 1) * group) - q.start)
        count = served.stop - served.start
        if parts and count * (parts[-1].kv.stop - parts[-1].kv.start) == parts[-1].q.stop - parts[-1].q.start:
            last = parts.pop()
            parts.append(_Part(slice(last.q.start, served.stop), slice(last.kv.start, head - kv.start + 1)))
        else:
            parts.append(_Part(served, slice(head - kv.start, head - kv.start + 1)))
    return parts
