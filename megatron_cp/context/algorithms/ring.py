"""Ring Attention: keys and values travel around a ring of ranks, queries stay.

Whether the ring is the plain, the striped or the zigzag one is decided by the positions that the ranks own.
Source: Liu et al. 2023, arXiv:2310.01889; striped: Brandon et al. 2023, arXiv:2311.09431; zigzag: the head-tail
placement of Megatron-LM and of Zhu's ring-flash-attention. Traffic, memory: `BACKENDS` in `megatron_cp.context`.
"""

from collections.abc import Iterator
from functools import cache
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor

from megatron_cp.comm import Done, Handle, Peers
from megatron_cp.context.layouts import Layout
from megatron_cp.context.masks import Mask
from megatron_cp.context.merge import SoftmaxMerge, Sum
from megatron_cp.context.returns import empty_like, exchange
from megatron_cp.context.task import Block, Saved, Task
from megatron_cp.context.tiles import hull, seen


def forward(q: Tensor, k: Tensor, v: Tensor, task: Task) -> tuple[Tensor, Saved]:
    """q [s b h d], k and v [s b g d] of this rank -> out [s b h d].

    Per rank at most 2 (p - 1) s b g d elements are sent; tokens of a block that no rank further on sees stay behind,
    and the ring turns in the direction in which that saves more. Two blocks are alive at a time.
    """
    merge = SoftmaxMerge(q)
    attend_around(merge, q, k, v, task)
    out, lse = merge.result()
    return out, Saved(q, k, v, out, lse)


def backward(dout: Tensor, saved: Saved, task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """dout [s b h d] -> dq, dk, dv.

    K and V travel as in the forward pass; a rank's part of dK and dV goes straight to the owner, rounded once, while
    the next block is computed, and is added there in float32.
    """
    dq, dk, dv = Sum(saved.q), Sum(saved.k), Sum(saved.v)
    attend_around_backward(dq, dk, dv, dout, saved, task)
    return dq.result(), dk.result(), dv.result()


def attend_around(merge: SoftmaxMerge, q: Tensor, k: Tensor, v: Tensor, task: Task) -> None:
    """Merge attention of q over the keys of the ring, for loops that have more keys to merge before they round."""
    way = route(task.runs, task.mask)
    for block in visits(Block(task.fabric.rank, 0, k, v), way, task.fabric):
        task.attend(merge, q, block)
        # not a third block beside the next two
        del block


def attend_around_backward(dq: Sum, dk: Sum, dv: Sum, dout: Tensor, saved: Saved, task: Task) -> None:
    """Add the gradients of `attend_around`."""
    way, mine = route(task.runs, task.mask), Block(task.fabric.rank, 0, saved.k, saved.v)
    home = Homecoming(mine, dk, dv, way, task.fabric)
    for block in visits(mine, way, task.fabric):
        dk_block, dv_block = home.sums(block)
        task.attend_backward(dq, dk_block, dv_block, dout, saved, block)
        home.start(block, dk_block, dv_block)
    home.finish()


Stretches = tuple[tuple[slice, ...], ...]


class Route(NamedTuple):
    """Which way blocks travel, and which stretch of a block's tokens each hop still carries.

    runs[owner] are the positions of the owner's tokens, wanted[owner][rank] is what the rank sees of them, and
    carried[owner][hop] what arrives of them at the rank that is `hop` hops further on.
    """

    turn: int
    runs: Layout
    wanted: Stretches
    carried: Stretches

    @property
    def volume(self) -> int:
        """Tokens that travel, over all ranks."""
        return sum(part.stop - part.start for hops in self.carried for part in hops[1:])


@cache
def route(runs: Layout, mask: Mask) -> Route:
    """The direction in which fewer tokens travel, and what each hop carries: what some rank further on still sees."""
    return shorter(runs, tuple(tuple(seen(queries, keys, mask) for queries in runs) for keys in runs))


def shorter(runs: Layout, wanted: Stretches) -> Route:
    """The better of the two directions for blocks of which each rank wants so much."""
    return min((directed(runs, wanted, turn) for turn in (1, -1)), key=lambda way: way.volume)


def directed(runs: Layout, wanted: Stretches, turn: int) -> Route:
    """The ring that turns this way: hop 0 is the owner's own visit, every later hop carries what is still wanted."""
    ranks = len(runs)
    carried = []
    for owner in range(ranks):
        ahead = [wanted[owner][(owner + turn * hop) % ranks] for hop in range(ranks)]
        # what a hop carries is what its rank and all further on want
        carried.append(tuple(accumulate(reversed(ahead), lambda *both: hull(both)))[::-1])
    return Route(turn, runs, wanted, tuple(carried))


def visits(block: Block, way: Route, fabric: Peers) -> Iterator[Block]:
    """Each block that comes by, this rank's own first; the next one is in flight during the body."""
    ahead, behind = (fabric.rank + way.turn) % fabric.size, (fabric.rank - way.turn) % fabric.size
    for hop in range(1, fabric.size):
        leaving, following = passed_on(block, way, hop)
        transfer = exchange(fabric, leaving, ahead, [following.k, following.v], behind)
        yield block
        transfer.wait()
        block = following
        # what was sent would be a third block beside the next two
        del leaving
    yield block


def passed_on(block: Block, way: Route, hop: int) -> tuple[list[Tensor], Block]:
    """What goes on of a block, and room for the one that takes its place, its `hop`-th from home."""
    owner = (block.owner - way.turn) % len(way.runs)
    due = way.carried[owner][hop]
    leaving = block.part(way.carried[block.owner][hop])
    k, v = empty_like(leaving, due.stop - due.start)
    return leaving, Block(owner, due.start, k, v, way.runs[owner])


class Homecoming:
    """Gradients of visiting blocks on their way to the owners, one batch in flight; `dk` and `dv` are of `mine`."""

    def __init__(self, mine: Block, dk: Sum, dv: Sum, way: Route, fabric: Peers) -> None:
        self._mine, self._totals, self._way, self._fabric = mine, (dk, dv), way, fabric
        self._hop = 0
        self._due = slice(0, 0)
        self._arriving: list[Tensor] = []
        self._transfer: Handle = Done()

    def sums(self, block: Block) -> tuple[Sum, Sum]:
        """Where this rank's part of the gradients of a block adds up: a block of its own needs no sending."""
        return self._totals if block.owner == self._mine.owner else (Sum(block.k), Sum(block.v))

    def start(self, block: Block, dk: Sum, dv: Sum) -> None:
        """Send what this hop computed for the block's owner; receive from the rank that computed for this one."""
        self.finish()
        fabric, wanted = self._fabric, self._way.wanted
        if block.owner != fabric.rank:
            worker = (fabric.rank + self._way.turn * self._hop) % fabric.size
            saw, self._due = wanted[block.owner][fabric.rank], wanted[fabric.rank][worker]
            leaving = block._replace(k=dk.result(), v=dv.result()).part(saw)
            self._arriving = empty_like(leaving, self._due.stop - self._due.start)
            self._transfer = exchange(fabric, leaving, block.owner, self._arriving, worker)
        self._hop += 1

    def finish(self) -> None:
        """Wait for the batch in flight and add what it brought."""
        self._transfer.wait()
        rows = slice(self._due.start - self._mine.first, self._due.stop - self._mine.first)
        for total, part in zip(self._totals, self._arriving, strict=False):
            if part.shape[0]:
                total.add(rows, part)
        self._arriving = []
