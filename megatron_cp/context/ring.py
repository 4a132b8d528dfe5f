"""Ring Attention: keys and values travel around a ring of ranks, queries stay.

Whether the ring is the plain, the striped or the zigzag one is decided by the positions that the ranks own.
Source: Liu et al. 2023, arXiv:2310.01889; striped: Brandon et al. 2023, arXiv:2311.09431; zigzag: the head-tail
placement of Megatron-LM and of Zhu's ring-flash-attention. Traffic, memory: `BACKENDS` in `megatron_cp.context`.
"""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from torch import Tensor

from megatron_cp.comm import Fabric, Handle
from megatron_cp.context.layouts import Layout
from megatron_cp.context.merge import SoftmaxMerge, Sum
from megatron_cp.context.task import Saved, Task
from megatron_cp.context.tiles import seen


def forward(q: Tensor, k: Tensor, v: Tensor, task: Task) -> tuple[Tensor, Saved]:
    """q [s b h d], k and v [s b g d] of this rank -> out [s b h d].

    Per rank at most 2 (p - 1) s b g d elements are sent; under a causal mask a block's tokens stop where no rank
    further on sees them, and the ring turns in the direction in which that saves more. Two blocks are alive at a time.
    """
    merge = SoftmaxMerge(q)
    for owner, (k_block, v_block) in _visits([k, v], task):
        task.attend(merge, q, k_block, v_block, task.runs[owner])
    out, lse = merge.result()
    return out, Saved(q, k, v, out, lse)


def backward(dout: Tensor, saved: Saved, task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """dout [s b h d] -> dq, dk, dv.

    K and V travel as in the forward pass; a rank's part of dK and dV goes straight to the owner, rounded once, while
    the next block is computed, and is added there in float32.
    """
    dq, dk, dv = Sum(saved.q), Sum(saved.k), Sum(saved.v)
    home = _Homecoming(task, dk, dv)
    for owner, (k, v) in _visits([saved.k, saved.v], task):
        dk_block, dv_block = (dk, dv) if owner == task.fabric.rank else (Sum(k), Sum(v))
        task.attend_backward(dq, dk_block, dv_block, dout, k, v, saved, task.runs[owner])
        home.start(owner, dk_block, dv_block)
    home.finish()
    return dq.result(), dk.result(), dv.result()


class Route(NamedTuple):
    """Which way blocks travel, and how many leading tokens of a block each hop still carries.

    carried[owner][hop] tokens of `owner`'s block arrive at the rank that is `hop` hops further on.
    """

    turn: int
    carried: tuple[tuple[int, ...], ...]

    @property
    def volume(self) -> int:
        return sum(map(sum, self.carried))


@cache
def route(runs: Layout, causal: bool) -> Route:
    """The direction in which fewer tokens travel, and what each hop carries: what some rank further on still sees."""
    return min((_route(runs, causal, turn) for turn in (1, -1)), key=lambda way: way.volume)


def _route(runs: Layout, causal: bool, turn: int) -> Route:
    ranks = len(runs)
    carried = []
    for owner in range(ranks):
        visible = [seen(runs[(owner + turn * hop) % ranks], runs[owner], causal) for hop in range(1, ranks)]
        carried.append(tuple(max(visible[hop:]) for hop in range(ranks - 1)))
    return Route(turn, tuple((0, *row) for row in carried))


def _visits(block: list[Tensor], task: Task) -> Iterator[tuple[int, list[Tensor]]]:
    """Each block that comes by, with its owner, this rank's own first; the next one is in flight during the body."""
    fabric, way = task.fabric, route(task.runs, task.causal)
    ahead, behind = (fabric.rank + way.turn) % fabric.size, (fabric.rank - way.turn) % fabric.size
    for hop in range(fabric.size):
        owner = (fabric.rank - way.turn * hop) % fabric.size
        arriving, transfer = block, None
        if hop + 1 < fabric.size:
            onward = way.carried[owner][hop + 1]
            due = way.carried[(owner - way.turn) % fabric.size][hop + 1]
            arriving = [tensor.new_empty((due, *tensor.shape[1:])) for tensor in block]
            transfer = _exchange(fabric, [tensor[:onward] for tensor in block], ahead, arriving, behind)
        yield owner, block
        if transfer:
            transfer.wait()
        block = arriving


class _Homecoming:
    """Gradients of visiting blocks on their way to the owners, one batch in flight."""

    def __init__(self, task: Task, dk: Sum, dv: Sum) -> None:
        self._task, self._totals = task, (dk, dv)
        self._turn = route(task.runs, task.causal).turn
        self._hop = 0
        self._arriving: list[Tensor] = []
        self._transfer: Handle | None = None

    def start(self, owner: int, *sums: Sum) -> None:
        """Send what this hop computed for `owner`; receive from the rank that computed for this one."""
        self.finish()
        fabric, runs = self._task.fabric, self._task.runs
        if owner != fabric.rank:
            worker = (fabric.rank + self._turn * self._hop) % fabric.size
            sees = seen(runs[fabric.rank], runs[owner], self._task.causal)
            due = seen(runs[worker], runs[fabric.rank], self._task.causal)
            parts = [part.result() for part in sums]
            self._arriving = [part.new_empty((due, *part.shape[1:])) for part in parts]
            leaving = [part[:sees] for part in parts]
            self._transfer = _exchange(fabric, leaving, owner, self._arriving, worker)
        self._hop += 1

    def finish(self) -> None:
        """Wait for the batch in flight and add what it brought."""
        if self._transfer:
            self._transfer.wait()
            for total, part in zip(self._totals, self._arriving, strict=True):
                total.add(slice(0, part.shape[0]), part)
        self._transfer = None


def _exchange(fabric: Fabric, leaving: list[Tensor], dst: int, arriving: list[Tensor], src: int) -> Handle:
    """Empty blocks are not sent; both sides know their length."""
    sends = [(tensor.contiguous(), dst) for tensor in leaving if tensor.shape[0]]
    return fabric.exchange(sends, [(buffer, src) for buffer in arriving if buffer.shape[0]])
