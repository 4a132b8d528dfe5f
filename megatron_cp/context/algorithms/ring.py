"""Ring Attention, the loop of backends `ring`, `striped` and `zigzag`: keys and values travel around, queries stay.

The three differ in the positions that the ranks own (`megatron_cp.context.layouts`) and in nothing else.
Source: Liu et al. 2023, arXiv:2310.01889; striped: Brandon et al. 2023, arXiv:2311.09431; zigzag: the head-tail
placement of Megatron-LM and of Zhu's ring-flash-attention. Traffic, memory: `BACKENDS` in `megatron_cp.context`.
"""

from collections.abc import Iterator
from itertools import accumulate

from torch import Tensor

from megatron_cp.comm import Peers
from megatron_cp.context import cache_sizes
from megatron_cp.context.circulate import Route, SlicesByRank, circulate_blocks
from megatron_cp.context.layouts import Layout
from megatron_cp.context.masks import AnyMask
from megatron_cp.context.merge import SoftmaxMerge, Sum
from megatron_cp.context.remembered import remembered
from megatron_cp.context.returns import Outgoing, Returns, incoming_exact
from megatron_cp.context.task import Block, Saved, Task
from megatron_cp.context.tiles import hull, seen


def forward(q: Tensor, k: Tensor, v: Tensor, task: Task) -> tuple[Tensor, Saved]:
    """Attend: q [s b h d], k and v [s b g d] of this rank -> out [s b h d].

    Per rank at most 2 (p - 1) s b g d elements are sent; tokens of a block that no rank further on sees stay behind,
    and the ring turns in the direction in which that saves more. Two blocks are alive at a time.
    """
    merge = SoftmaxMerge(q, v.shape[3])
    attend_around(merge, q, k, v, task)
    out, lse = merge.result()
    return out, Saved(q, k, v, out, lse)


def backward(dout: Tensor, saved: Saved, task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate: dout [s b h d] -> dq, dk, dv.

    K and V travel as in the forward pass; a rank's part of dK and dV goes straight to the owner while the next block is
    computed, and is added there. Both are done in float32.
    """
    dq, dk, dv = Sum(saved.q), Sum(saved.k), Sum(saved.v)
    attend_around_backward(dq, dk, dv, dout, saved, task)
    return dq.result(), dk.result(), dv.result()


def attend_around(merge: SoftmaxMerge, q: Tensor, k: Tensor, v: Tensor, task: Task) -> None:
    """Merge attention of q over the keys of the ring, for loops that have more keys to merge before they round."""
    # 1. pass the block on, and receive the next one during the body
    for block in circulating(Block(task.fabric.rank, 0, k, v), route(task.layout, task.mask), task.fabric):
        # 2. attend to the block at hand, merged by online softmax
        task.attend(merge, q, block)
        # a reference would keep a third block alive beside the next two
        del block


def attend_around_backward(dq: Sum, dk: Sum, dv: Sum, dout: Tensor, saved: Saved, task: Task) -> None:
    """Add the gradients of `attend_around`."""
    way, mine = route(task.layout, task.mask), Block(task.fabric.rank, 0, saved.k, saved.v)
    returns = GradientReturns(mine, dk, dv, way, task.fabric)
    # 1. pass the block on, and receive the next one during the body
    for block in circulating(mine, way, task.fabric):
        # 2. add to dq here, and to this rank's part of the block's dk and dv
        dk_block, dv_block = returns.sums(block)
        task.attend_backward(dq, dk_block, dv_block, dout, saved, block)
        # 3. return that part to the owner of the block
        returns.start(block, dk_block, dv_block)
    returns.finish()


@remembered(cache_sizes.LAYOUTS)
def route(layout: Layout, mask: AnyMask) -> Route:
    """Choose the direction in which fewer tokens travel; a hop carries what any rank from there on still sees."""
    return shorter(layout, tuple(tuple(seen(queries, keys, mask) for queries in layout) for keys in layout))


def shorter(layout: Layout, wanted: SlicesByRank) -> Route:
    """Return the better of the two directions for blocks of which the ranks want these stretches."""
    return min((directed(layout, wanted, turn) for turn in (1, -1)), key=lambda way: way.volume)


def directed(layout: Layout, wanted: SlicesByRank, turn: int) -> Route:
    """Return the route of this direction: hop 0 is the owner itself, every later hop carries what is still wanted."""
    ranks = len(layout)
    carried = []
    for owner in range(ranks):
        ahead = [wanted[owner][(owner + turn * hop) % ranks] for hop in range(ranks)]
        # a hop carries what its rank and all further on want
        carried.append(tuple(accumulate(reversed(ahead), lambda *both: hull(both)))[::-1])
    return Route(turn, layout, wanted, tuple(carried))


def circulating(block: Block, way: Route, fabric: Peers) -> Iterator[Block]:
    """Yield this rank's own block, then every other rank's; the next one is in flight during the body."""
    for (here,) in circulate_blocks([block], [way], fabric):
        yield here
        del here


class GradientReturns:
    """Gradients of other ranks' blocks on their way to the owners, one batch in flight; dk and dv are those of `mine`.

    Blocks come in the order of `circulate`.
    """

    def __init__(self, mine: Block, dk: Sum, dv: Sum, way: Route, fabric: Peers) -> None:
        self._mine, self._totals, self._way, self._fabric = mine, (dk, dv), way, fabric
        self._returns, self._hop = Returns(fabric), 0

    def sums(self, block: Block) -> tuple[Sum, Sum]:
        """Return the sums for this rank's part of a block's gradients: the totals themselves for its own block."""
        return self._totals if block.owner == self._mine.owner else (Sum(block.k), Sum(block.v))

    def start(self, block: Block, dk: Sum, dv: Sum) -> None:
        """Send this hop's gradients to the block's owner; receive from the rank that had this rank's block."""
        self.finish()
        me, size, wanted = self._fabric.rank, self._fabric.size, self._way.wanted
        if block.owner != me:
            worker = (me + self._way.turn * self._hop) % size
            leaving = block._replace(k=dk.exact(), v=dv.exact()).part(wanted[block.owner][me])
            due = wanted[me][worker]
            rows = slice(due.start - self._mine.first, due.stop - self._mine.first)
            self._returns.start([Outgoing(block.owner, leaving)], incoming_exact(worker, rows, *self._totals))
        self._hop += 1

    def finish(self) -> None:
        """Wait for the batch in flight and add its gradients."""
        self._returns.finish()
