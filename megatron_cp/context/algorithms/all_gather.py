"""All-gather of keys and values, as in Llama 3: every rank has K and V of all tokens that its queries see at once.

It gathers one group of KV heads after the other: the next group is on its way while the current one is computed, and
in the backward pass the gradients of the one before are on their way to their owners. A collective brings every rank
all tokens, and each of them once to a node, whose ranks share its links. Messages bring a rank only the tokens that it
sees: those from the first to the last, or of packed documents the stretches of them. `by_collective` says which it is.

Source: Llama Team 2024, arXiv:2407.21783, section 3.3.2. Traffic, memory: `BACKENDS` in `megatron_cp.context`.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from megatron_cp.comm import Done, Fabric, Gathering, Handle
from megatron_cp.context import cache_sizes
from megatron_cp.context.heads import pieces
from megatron_cp.context.layouts import Layout, Place, Runs, common, cut, gathered, join, length
from megatron_cp.context.masks import AnyMask
from megatron_cp.context.merge import SoftmaxMerge, Sum, accumulator_dtype
from megatron_cp.context.packing import heads_of, packed, unpacked, with_dim
from megatron_cp.context.remembered import remembered
from megatron_cp.context.returns import Incoming, Outgoing, Returns
from megatron_cp.context.task import Block, Saved, Task
from megatron_cp.context.tiles import wanted

GROUPS = 4
"""Groups of KV heads, where there are so many; two are alive at a time."""

MESSAGES = 2
"""Most parts of a rank's tokens that are a message each, as many as zigzag has."""


def forward(q: Tensor, k: Tensor, v: Tensor, task: Task) -> tuple[Tensor, Saved]:
    """Attend: q [s b h d], k and v [s b g d] of this rank -> out [s b h d].

    At most 2 / GROUPS of the gathered sequence's 2 p s b g d elements are alive meanwhile, all with one KV head.
    """
    out, lse = q.new_empty(with_dim(q, v.shape[3]).shape), q.new_empty(q.shape[:3], dtype=accumulator_dtype(q))
    # 1. gather one group of KV heads, the next one is in flight during the body
    for heads, block in _gathered_groups(q, k, v, _transport(task), task):
        # 2. attend the query heads of the group to all keys that they see
        merge = SoftmaxMerge(q[:, :, heads.q], v.shape[3])
        task.attend(merge, q[:, :, heads.q], block)
        out[:, :, heads.q], lse[:, :, heads.q] = merge.result()
        # a reference would keep a third group alive beside the next two
        del block
    return out, Saved(q, k, v, out, lse)


def backward(dout: Tensor, saved: Saved, task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate: dout [s b h d] -> dq, dk, dv; K and V are gathered again, parts of dK and dV travel in float32."""
    dq, transport = torch.empty_like(saved.q), _transport(task)
    shapes: list[list[tuple[int, int]]] = []
    # 1. gather one group of KV heads, as in the forward pass
    for heads, block in _gathered_groups(saved.q, saved.k, saved.v, transport, task):
        # 2. differentiate the query heads of the group
        q, out, lse, dout_i = (x[:, :, heads.q] for x in (saved.q, saved.out, saved.lse, dout))
        # s b (k v) d, so that dK and dV of a stretch are one message
        grads = _zeros(block)
        shapes.append(heads_of(block.k, block.v))
        total_q, total_k, total_v = Sum(q), *map(Sum, (block.k, block.v), unpacked(grads, shapes[-1]))
        task.attend_backward(total_q, total_k, total_v, dout_i, Saved(q, block.k, block.v, out, lse), block)
        dq[:, :, heads.q] = total_q.result()
        # what has not been added yet is added to `grads`
        total_k.exact(), total_v.exact()
        # 3. return the gradients of the gathered keys and values to their owners
        transport.send_back(grads)
        del block, grads, total_k, total_v
    dk, dv = zip(*map(unpacked, transport.sums(), shapes), strict=True)
    return dq, torch.cat(dk, 2).to(dq.dtype), torch.cat(dv, 2).to(dq.dtype)


@remembered(cache_sizes.LAYOUTS)
def by_collective(layout: Layout, mask: AnyMask, nodes: tuple[int, ...]) -> bool:
    """True if a collective brings at most as many tokens as messages do over the links that fewest ranks share.

    Those are the links between nodes, if the ranks are on several: a collective brings a node each token of other nodes
    once, messages as often as it has ranks that see the token. On one node a rank receives all tokens or those it sees.
    """
    tokens = [length(runs) for runs in layout]
    if len({*tokens}) > 1:
        # a collective takes as much from every rank
        return False
    whole, places = gathered(layout)
    # where the links end that count: at nodes, or at ranks
    ends = nodes if len({*nodes}) > 1 else tuple(range(len(layout)))
    once = sum(tokens[owner] for end in {*ends} for owner in range(len(layout)) if ends[owner] != end)
    by_messages = 0
    for end, runs in zip(ends, layout, strict=True):
        others = [place for place in places if ends[place.rank] != end]
        by_messages += sum(part.stop - part.start for _, part in _parts(wanted(runs, whole, mask), others))
    return once <= by_messages


class HeadGroup(NamedTuple):
    """KV heads, and the query heads that they serve."""

    q: slice
    kv: slice


def groups(heads: int, kv_heads: int) -> list[HeadGroup]:
    """Cut the heads into at most GROUPS groups of whole KV heads."""
    serves = heads // kv_heads
    return [
        HeadGroup(slice(part.start * serves, part.stop * serves), part)
        for part in pieces(slice(0, kv_heads), min(GROUPS, kv_heads))
    ]


class View(NamedTuple):
    """The stretches of the gathered sequence that a rank's queries see, and the messages that bring them.

    runs:  positions of the whole sequence, or of the stretches if they are several
    first: the first of these that comes
    sizes: lengths of the parts that the stretches are put together from, each of one rank's tokens
    parts: whose tokens these are, and which of its local tokens
    sends: ranks that see this rank's tokens, and which of them, in the order of the receivers' parts
    stretches: these tokens, each stretch once
    by_peer: each peer gets one message, which is put together and taken apart; else each part is a message
    """

    runs: Runs
    first: int
    sizes: tuple[int, ...]
    parts: tuple[tuple[int, slice], ...]
    sends: tuple[tuple[int, slice], ...]
    stretches: tuple[slice, ...]
    by_peer: bool


@remembered(cache_sizes.GROUPS)
def view_of(layout: Layout, mask: AnyMask, me: int) -> View:
    """Return the view of rank `me`."""
    whole, places = gathered(layout)
    reach = [wanted(runs, whole, mask) for runs in layout]
    parts = list(_parts(reach[me], places))
    mine = [place for place in places if place.rank == me]
    sends = [(rank, part) for rank in range(len(layout)) if rank != me for _, part in _parts(reach[rank], mine)]
    sizes = tuple(local.stop - local.start for _, local in parts)
    runs, first = whole, reach[me][0].start if reach[me] else 0
    if len(reach[me]) > 1:
        runs, first = join([run for stretch in reach[me] for run in cut(whole, stretch)]), 0
    stretches = tuple({local for _, local in sends})
    return View(runs, first, sizes, tuple(parts), tuple(sends), stretches, _in_many_parts(layout, reach, places))


def _in_many_parts(layout: Layout, reach: Sequence[Sequence[slice]], places: Sequence[Place]) -> bool:
    """True if some rank sees another's tokens in more parts than are a message each; the same on all ranks."""
    if max(map(len, layout)) <= MESSAGES and max(map(len, reach)) <= 1:
        return False
    for me, stretches in enumerate(reach):
        counts = Counter(rank for rank, _ in _parts(stretches, places) if rank != me)
        if max(counts.values(), default=0) > MESSAGES:
            return True
    return False


def _parts(stretches: Sequence[slice], places: Sequence[Place]) -> Iterator[tuple[int, slice]]:
    """Yield the ranks, and which of their local tokens, that stretches of the whole are put together from."""
    for number, part in common(stretches, [place.whole for place in places]):
        rank, local, whole = places[number]
        yield rank, slice(part.start - whole.start + local.start, part.stop - whole.start + local.start)


@runtime_checkable
class Transport(Protocol):
    """How K and V of all ranks come to this one, and how their gradients go back: its tokens stand in sequence order.

    runs:  positions of the whole sequence
    first: the first of its tokens that come
    """

    runs: Runs
    first: int

    def gather(self, mine: Tensor) -> Callable[[], Tensor]:
        """Start to gather `mine` [s ...] of the ranks; the function that is returned waits for the result."""
        ...

    def send_back(self, grads: Tensor) -> None:
        """Start to return float32 gradients of what was gathered, once those before have arrived."""
        ...

    def sums(self) -> list[Tensor]:
        """Wait, and return the sums [s ...] of what all ranks returned, one for each call of `send_back`."""
        ...


def _transport(task: Task) -> Transport:
    """Return the one that sends less."""
    fabric = task.fabric
    if isinstance(fabric, Gathering) and by_collective(task.layout, task.mask, fabric.nodes):
        return Collective(task.layout, fabric)
    return Messages(task.layout, task.mask, fabric)


class Messages:
    """Each rank gets what it sees from its owner, and sends the gradients of that straight there."""

    def __init__(self, layout: Layout, mask: AnyMask, fabric: Fabric) -> None:
        self._view, self._fabric, self._tokens = view_of(layout, mask, fabric.rank), fabric, length(layout[fabric.rank])
        self.runs, self.first = self._view.runs, self._view.first
        self._returns = Returns(fabric)
        self._totals: list[Sum] = []

    def gather(self, mine: Tensor) -> Callable[[], Tensor]:
        view, me = self._view, self._fabric.rank
        buffer = mine.new_empty((sum(view.sizes), *mine.shape[1:]))
        arriving = list(zip(view.parts, buffer.split(view.sizes), strict=True))
        for (rank, local), here in arriving:
            if rank == me:
                here.copy_(mine[local])
        others = [(rank, here) for (rank, _), here in arriving if rank != me]
        if view.by_peer:
            return self._gather_by_peer(mine, buffer, others)
        # most ranks see the same stretch
        leaving = {local: mine[local] for local in view.stretches}
        sends = [(leaving[local], rank) for rank, local in view.sends]
        transfer = self._fabric.exchange(sends, [(here, rank) for rank, here in others])

        def arrived() -> Tensor:
            transfer.wait()
            return buffer

        return arrived

    def _gather_by_peer(
        self, mine: Tensor, buffer: Tensor, others: Sequence[tuple[int, Tensor]]
    ) -> Callable[[], Tensor]:
        sends = [(torch.cat([mine[local] for local in parts]), peer) for peer, parts in _by_rank(self._view.sends)]
        places = _by_rank(others)
        messages = [mine.new_empty((sum(map(len, parts)), *mine.shape[1:])) for _, parts in places]
        transfer = self._fabric.exchange(sends, [(box, peer) for box, (peer, _) in zip(messages, places, strict=True)])

        def arrived() -> Tensor:
            transfer.wait()
            for message, (_, parts) in zip(messages, places, strict=True):
                for part, arrived in zip(parts, message.split([*map(len, parts)]), strict=True):
                    part.copy_(arrived)
            messages.clear()
            return buffer

        return arrived

    def send_back(self, grads: Tensor) -> None:
        view, me = self._view, self._fabric.rank
        mine = grads.new_zeros((self._tokens, *grads.shape[1:]))
        total = Sum(mine, mine)
        self._totals.append(total)
        leaving: list[tuple[int, Tensor]] = []
        for (rank, local), part in zip(view.parts, grads.split(view.sizes), strict=True):
            if rank == me:
                total.add(local, part)
            else:
                leaving.append((rank, part))
        if view.by_peer:
            outgoing = [Outgoing(peer, [torch.cat(parts)]) for peer, parts in _by_rank(leaving)]
            expected = [_apart(peer, parts, grads, total) for peer, parts in _by_rank(view.sends)]
            self._returns.start(outgoing, expected)
            return
        sizes = [local.stop - local.start for _, local in view.sends]
        buffers = grads.new_empty((sum(sizes), *grads.shape[1:])).split(sizes) if sizes else ()
        arriving = zip(view.sends, buffers, strict=True)
        self._returns.start(
            [Outgoing(rank, [part]) for rank, part in leaving],
            [Incoming(rank, local, [buffer], total.add) for (rank, local), buffer in arriving],
        )

    def sums(self) -> list[Tensor]:
        self._returns.finish()
        return [total.result() for total in self._totals]


def _by_rank[T](parts: Iterable[tuple[int, T]]) -> list[tuple[int, list[T]]]:
    """Return the ranks in their order, each with its parts."""
    found: dict[int, list[T]] = defaultdict(list)
    for rank, part in parts:
        found[rank].append(part)
    return sorted(found.items())


def _apart(peer: int, parts: Sequence[slice], like: Tensor, total: Sum) -> Incoming:
    """Expect one message of a peer with its part of the gradients of these of this rank's tokens."""
    sizes = [part.stop - part.start for part in parts]

    def add(_: slice, message: Tensor) -> None:
        for part, arrived in zip(parts, message.split(sizes), strict=True):
            total.add(part, arrived)

    return Incoming(peer, slice(0, sum(sizes)), [like.new_empty((sum(sizes), *like.shape[1:]))], add)


class Collective:
    """An all-gather brings every rank all tokens, a reduce-scatter in the accumulator's dtype adds up the gradients."""

    def __init__(self, layout: Layout, fabric: Gathering) -> None:
        self.runs, self._places = gathered(layout)
        self.first, self._fabric = 0, fabric
        self._sums: list[Tensor] = []
        self._transfer: Handle = Done()

    def gather(self, mine: Tensor) -> Callable[[], Tensor]:
        by_rank = mine.new_empty((self._fabric.size, *mine.shape))
        transfer = self._fabric.start_all_gather(by_rank, mine)

        def arrived() -> Tensor:
            transfer.wait()
            return torch.cat([by_rank[place.rank][place.local] for place in self._places])

        return arrived

    def send_back(self, grads: Tensor) -> None:
        self._transfer.wait()
        local = [
            grads[place.whole] for place in sorted(self._places, key=lambda place: (place.rank, place.local.start))
        ]
        by_rank = torch.cat(local).unflatten(0, (self._fabric.size, len(grads) // self._fabric.size))
        self._sums.append(torch.empty_like(by_rank[0]))
        self._transfer = self._fabric.start_reduce_scatter(self._sums[-1], by_rank)

    def sums(self) -> list[Tensor]:
        self._transfer.wait()
        return self._sums


def _gathered_groups(
    q: Tensor, k: Tensor, v: Tensor, transport: Transport, task: Task
) -> Iterator[tuple[HeadGroup, Block]]:
    """Yield each group with the K and V that this rank's queries see; the next one is in flight during the body."""

    def start(heads: HeadGroup) -> Callable[[], Tensor]:
        # s b (k v) d, so that K and V of a stretch are one message
        return transport.gather(packed(k[:, :, heads.kv], v[:, :, heads.kv]))

    parts = groups(q.shape[2], k.shape[2])
    waiting = [start(parts[0])]
    for part, after in zip(parts, [*parts[1:], None], strict=True):
        # no reference stays to what a collective has filled
        k_here, v_here = unpacked(waiting.pop()(), heads_of(k[:, :, part.kv], v[:, :, part.kv]))
        if after is not None:
            waiting.append(start(after))
        yield part, Block(task.fabric.rank, transport.first, k_here, v_here, transport.runs)
        del k_here, v_here


def _zeros(block: Block) -> Tensor:
    """Return zeros for the sums of dK and dV of a block, s b (k v) d."""
    shape = packed(block.k[:0], block.v[:0]).shape[1:]
    return torch.zeros((len(block.k), *shape), dtype=accumulator_dtype(block.k), device=block.k.device)
