"""Heads for tokens and back: the exchange of Ulysses, for any number of query heads, KV heads and ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_cp.comm import Fabric
from megatron_cp.context.layouts import Layout, Place, Runs, gathered
from megatron_cp.context.merge import Sum
from megatron_cp.kernels import Kernel


class Hands(NamedTuple):
    """Which query heads, and which KV heads these need, every rank is dealt."""

    q: tuple[slice, ...]
    kv: tuple[slice, ...]


@cache
def deal(heads: int, kv_heads: int, ranks: int) -> Hands:
    """Query heads in order, one more for the first `heads % ranks` ranks.

    Raises ValueError when some rank would get none.
    """
    if ranks > heads:
        raise ValueError(
            f"{ranks} ranks cannot share {heads} query heads; "
            f"exchange heads among at most {heads} ranks (backend 'usp') or use backend 'zigzag'"
        )
    few, more = divmod(heads, ranks)
    starts = [rank * few + min(rank, more) for rank in range(ranks + 1)]
    group = heads // kv_heads
    q = tuple(slice(start, stop) for start, stop in pairwise(starts))
    return Hands(q, tuple(slice(hand.start // group, (hand.stop - 1) // group + 1) for hand in q))


@dataclass(frozen=True)
class Swap:
    """The exchange of heads for tokens among the ranks of a fabric."""

    fabric: Fabric
    members: Layout
    hands: Hands

    @property
    def whole(self) -> Runs:
        return gathered(self.members)[0]

    @property
    def places(self) -> tuple[Place, ...]:
        return gathered(self.members)[1]

    def to_heads(self, *tensors: Tensor) -> list[Tensor]:
        """(q) or (q, k, v) with all heads of this rank's tokens -> my heads of all tokens, in one exchange.

        The results are in sequence order and views of one buffer; the stretches of each rank arrive in their place.
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
        """My heads of all tokens -> all heads of this rank's tokens; heads on several ranks are added in float32."""
        arrived = self._collect(torch.cat(list(tensors), 2) if len(tensors) > 1 else tensors[0].contiguous(), dealt)
        results = []
        for index, tensor in enumerate(tensors):
            hands = dealt[index]
            pieces = [pieces[index] for pieces in arrived]
            if all(left.stop == right.start for left, right in pairwise(hands)):
                results.append(torch.cat(pieces, 2))
            else:
                results.append(_add_heads(pieces, hands, tensor))
        return results

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
        results = []
        for a, c in self._parts:
            dout_a, q_a, out_a, lse_a = (x[:, :, a] for x in (dout, q, out, lse))
            k_c, v_c = k[:, :, c], v[:, :, c]
            results.append(self._kernel.backward(dout_a, q_a, k_c, v_c, out_a, lse_a, scale=scale, causal=causal))
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
