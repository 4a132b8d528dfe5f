"""Partial results on their way to the ranks that add them up."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from megatron_cp.comm import Done, Fabric, Handle, Peers
from megatron_cp.context.merge import SoftmaxMerge, Sum
from megatron_cp.context.task import Queries


def empty_like(tensors: list[Tensor], tokens: int) -> list[Tensor]:
    """Buffers for as many tensors of `tokens` tokens."""
    return [tensor.new_empty((tokens, *tensor.shape[1:])) for tensor in tensors]


def exchange(fabric: Peers, leaving: list[Tensor], dst: int, arriving: list[Tensor], src: int) -> Handle:
    """Send to one rank, receive from another; empty tensors are not sent, both sides know their length."""
    sends = [(tensor.contiguous(), dst) for tensor in leaving if tensor.shape[0]]
    return fabric.exchange(sends, [(buffer, src) for buffer in arriving if buffer.shape[0]])


class Leaving(NamedTuple):
    """What this rank computed for rank `owner`."""

    owner: int
    tensors: Sequence[Tensor]


class Due(NamedTuple):
    """What rank `worker` computed for `rows` of this rank's tokens: `add(rows, *buffers)` once they are filled."""

    worker: int
    rows: slice
    buffers: Sequence[Tensor]
    add: Callable[..., None]


class Returns:
    """One batch of partial results in flight while the next ones are computed; all ranks start the same batches."""

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric
        self._due: Sequence[Due] = ()
        self._transfer: Handle = Done()

    def start(self, leaving: Sequence[Leaving], due: Sequence[Due]) -> None:
        """Send and expect these, after the batch before them has been added; nobody sends what has no rows."""
        self.finish()
        self._due = [item for item in due if item.rows.start < item.rows.stop]
        sends = [(tensor.contiguous(), item.owner) for item in leaving for tensor in item.tensors if tensor.shape[0]]
        self._transfer = self._fabric.exchange(
            sends, [(buffer, item.worker) for item in self._due for buffer in item.buffers]
        )

    def finish(self) -> None:
        """Wait for the batch in flight and add what it brought."""
        self._transfer.wait()
        for item in self._due:
            item.add(item.rows, *item.buffers)
        self._due = ()


class Visit(NamedTuple):
    """Queries of another rank at this one, and the rank `host` at which this rank's own `away` are meanwhile."""

    queries: Queries
    tensors: list[Tensor]
    host: int
    away: slice
    at_home: bool

    def results(self, partial: Sequence[Tensor], total: SoftmaxMerge | Sum) -> tuple[list[Leaving], list[Due]]:
        """The guests' results leave for their owner, those of this rank's queries are due from their host."""
        owner, rows, first = self.queries
        leaving = [tensor[rows.start - first : rows.stop - first] for tensor in partial]
        return [Leaving(owner, leaving)], [Due(self.host, self.away, total.room(self.away), total.add)]
