"""Tokens that travel around a ring of ranks, each hop in flight while the tokens before it are used."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from megatron_cp.comm import Message, Peers
from megatron_cp.context.layouts import Layout
from megatron_cp.context.packing import heads_of, packed, unpacked
from megatron_cp.context.returns import empty_like
from megatron_cp.context.task import Block

SlicesByRank = tuple[tuple[slice, ...], ...]


class Route(NamedTuple):
    """Direction in which shards travel, and the stretch of a shard's tokens that each hop still carries.

    turn:                   +1 to the next rank, -1 to the rank before
    layout[owner]:          positions of the owner's tokens
    wanted[owner][rank]:    the stretch of them that the rank uses
    carried[owner][hop]:    the stretch of them that arrives at the rank `hop` hops from the owner
    """

    turn: int
    layout: Layout
    wanted: SlicesByRank
    carried: SlicesByRank

    @property
    def volume(self) -> int:
        """Tokens that travel, over all ranks."""
        return sum(part.stop - part.start for hops in self.carried for part in hops[1:])


class Shard(NamedTuple):
    """Tensors with the tokens of rank `owner`, from its local token `first` on."""

    owner: int
    first: int
    tensors: Sequence[Tensor]

    def part(self, tokens: slice) -> list[Tensor]:
        """Return these of the owner's tokens."""
        start, stop = max(0, tokens.start - self.first), max(0, tokens.stop - self.first)
        if start == 0 and all(stop == tensor.shape[0] for tensor in self.tensors):
            return list(self.tensors)
        return [tensor[start:stop] for tensor in self.tensors]


def circulate(shards: Sequence[Shard], routes: Sequence[Route], fabric: Peers) -> Iterator[Sequence[Shard]]:
    """Yield this rank's own shards, then those of the rank before on each route, and so on around the ring.

    The next shards are in flight during the body, those of all routes in one batch. `shards` and `routes` are paired;
    stretches without tokens are not sent.
    """
    for hop in range(1, fabric.size):
        following: list[Shard] = []
        sends: list[Message] = []
        recvs: list[Message] = []
        for shard, route in zip(shards, routes, strict=True):
            ahead, behind = (fabric.rank + route.turn) % fabric.size, (fabric.rank - route.turn) % fabric.size
            owner = (shard.owner - route.turn) % fabric.size
            due = route.carried[owner][hop]
            leaving = shard.part(route.carried[shard.owner][hop])
            arriving = empty_like(leaving, due.stop - due.start)
            sends += [(tensor.contiguous(), ahead) for tensor in leaving if tensor.shape[0]]
            recvs += [(buffer, behind) for buffer in arriving if buffer.shape[0]]
            following.append(Shard(owner, due.start, arriving))
        transfer = fabric.exchange(sends, recvs)
        yield shards
        transfer.wait()
        shards = following
        # a reference to what was sent would keep a third shard alive beside the next two
        del sends, recvs, leaving, arriving, shard, following
    yield shards


def circulate_blocks(blocks: Sequence[Block], routes: Sequence[Route], fabric: Peers) -> Iterator[Sequence[Block]]:
    """Yield blocks of keys and values as `circulate` yields shards; K and V of a hop are one message."""
    if fabric.size == 1:
        yield blocks
        return
    heads = heads_of(blocks[0].k, blocks[0].v)
    # this frame keeps no reference to what the first hop sends
    for shards in circulate(_fused(blocks), routes, fabric):
        yield [_block(shard, route.layout, heads) for shard, route in zip(shards, routes, strict=True)]
        del shards


def _fused(blocks: Sequence[Block]) -> list[Shard]:
    # s b g d, s b g d -> s b (k v) d
    return [Shard(block.owner, block.first, [packed(block.k, block.v)]) for block in blocks]


def _block(shard: Shard, layout: Layout, heads: Sequence[tuple[int, int]]) -> Block:
    k, v = unpacked(shard.tensors[0], heads)
    return Block(shard.owner, shard.first, k, v, layout[shard.owner])
