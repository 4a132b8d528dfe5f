"""Partial results on their way to the ranks that add them up."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from megatron_cp.comm import Done, Handle, Peers
from megatron_cp.context.merge import SoftmaxMerge, Sum
from megatron_cp.context.task import Queries


def empty_like(tensors: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """Return one uninitialized tensor of `tokens` tokens for each of these."""
    return [tensor.new_empty((tokens, *tensor.shape[1:])) for tensor in tensors]


def exchange(fabric: Peers, leaving: Sequence[Tensor], dst: int, arriving: Sequence[Tensor], src: int) -> Handle:
    """Send to one rank and receive from another; both sides leave out tensors without tokens."""
    sends = [(tensor.contiguous(), dst) for tensor in leaving if tensor.shape[0]]
    return fabric.exchange(sends, [(buffer, src) for buffer in arriving if buffer.shape[0]])


class Outgoing(NamedTuple):
    """Results that this rank computed for rank `owner`."""

    owner: int
    tensors: Sequence[Tensor]


class Incoming(NamedTuple):
    """Results of rank `worker` for `rows` of this rank's tokens: `add(rows, *buffers)` takes them once they arrived."""

    worker: int
    rows: slice
    buffers: Sequence[Tensor]
    add: Callable[..., None]


def incoming(worker: int, rows: slice, *totals: SoftmaxMerge | Sum) -> list[Incoming]:
    """Expect a worker's part of these rows of each total, in this order."""
    return [Incoming(worker, rows, total.room(rows), total.add) for total in totals]


def incoming_exact(worker: int, rows: slice, *totals: Sum) -> list[Incoming]:
    """Expect a worker's part of these rows of each total, not rounded: parts that are rounded add up their errors."""
    return [Incoming(worker, rows, total.room(rows, exact=True), total.add) for total in totals]


class Returns:
    """One batch of partial results in flight while the next ones are computed; all ranks start the same batches."""

    def __init__(self, fabric: Peers) -> None:
        self._fabric = fabric
        self._incoming: Sequence[Incoming] = ()
        self._transfer: Handle = Done()

    def start(self, outgoing: Sequence[Outgoing], incoming: Sequence[Incoming]) -> None:
        """Send and expect these, after the batch before them has been added; both sides leave out empty rows."""
        self.finish()
        self._incoming = [item for item in incoming if item.rows.start < item.rows.stop]
        sends = [(tensor.contiguous(), item.owner) for item in outgoing for tensor in item.tensors if tensor.shape[0]]
        self._transfer = self._fabric.exchange(
            sends, [(buffer, item.worker) for item in self._incoming for buffer in item.buffers]
        )

    def finish(self) -> None:
        """Wait for the batch in flight and add its results."""
        self._transfer.wait()
        for item in self._incoming:
            item.add(item.rows, *item.buffers)
        self._incoming = ()


class QueryShard(NamedTuple):
    """Queries that this rank attends for their owner.

    worker: the rank that meanwhile attends this rank's own queries `lent`
    own:    true if the queries are this rank's
    """

    queries: Queries
    tensors: Sequence[Tensor]
    worker: int
    lent: slice
    own: bool

    def returns(self, partial: Sequence[Tensor], total: SoftmaxMerge | Sum) -> tuple[list[Outgoing], list[Incoming]]:
        """Return `partial` to the owner of the queries, and add what the worker returns to `total`."""
        owner, rows, first = self.queries
        leaving = [tensor[rows.start - first : rows.stop - first] for tensor in partial]
        return [Outgoing(owner, leaving)], incoming(self.worker, self.lent, total)
