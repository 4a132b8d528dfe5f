"""The seam between algorithms and the ranks they run on: what a fabric offers, and what every message must be.

A fabric connects the ranks of one group and counts the bytes that this rank sends.
"""

from collections.abc import Sequence
from hashlib import blake2b
from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from megatron_cp.grid import Grid

Message = tuple[Tensor, int]


class MessageError(RuntimeError):
    """A message that a process group would refuse, corrupt or wait for without end."""


@runtime_checkable
class Handle(Protocol):
    """A transfer in flight: the buffers passed to `exchange` may not be touched before `wait` returns."""

    def wait(self) -> None: ...


@runtime_checkable
class Transfer(Handle, Protocol):
    """A transfer that can be asked whether it has finished; one that cannot tell returns False."""

    def done(self) -> bool: ...


@runtime_checkable
class Peers(Protocol):
    """Numbered ranks that send to each other, as seen by one of them."""

    rank: int
    size: int

    def exchange(self, sends: Sequence[Message], recvs: Sequence[Message]) -> Handle:
        """Start one batch: send each tensor to its rank and fill each buffer from its rank, in order per pair of ranks.

        Tensors are contiguous and not empty; a send and the buffer that receives it have one shape, dtype and kind of
        device. A message to oneself is not sent but copied by the caller.
        """
        ...


@runtime_checkable
class Fabric(Peers, Protocol):
    """The ranks of one group, as seen by one of them; all of them call a collective together."""

    sent: int

    def all_gather(self, local: Tensor) -> Tensor:
        """Stack the equally shaped `local` of all ranks in a new leading dim."""
        ...

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        """Add `whole` [p ...] over all ranks and return this rank's part [...] of the sum, in the dtype of `whole`."""
        ...

    def all_to_all(self, rows: Tensor, sends: Sequence[int], recvs: Sequence[int]) -> Tensor:
        """Send the first `sends[0]` of `rows` [n ...] to rank 0, the next `sends[1]` to rank 1 and so on.

        Returns what arrives, `recvs[r]` rows from rank r, in order of rank. Counts may be 0 and include this rank's
        own; `recvs[r]` here is `sends` of rank r for this rank.
        """
        ...

    def subset(self, ranks: Sequence[int]) -> Self:
        """Connect these ranks, which include this one; every rank of the group calls it together.

        Where ranks are processes of a run, all of its processes do, each in its own group.
        """
        ...


@runtime_checkable
class Gathering(Fabric, Protocol):
    """A fabric whose all-gather and reduce-scatter run beside what is computed, and that knows its ranks' nodes.

    nodes: the node of each rank
    """

    @property
    def nodes(self) -> tuple[int, ...]: ...

    def start_all_gather(self, gathered: Tensor, local: Tensor) -> Handle:
        """Start to fill `gathered` [p ...] with `local` [...] of all ranks; both are contiguous."""
        ...

    def start_reduce_scatter(self, part: Tensor, whole: Tensor) -> Handle:
        """Start to add `whole` [p ...] over all ranks and to fill `part` [...] with this rank's part of the sum."""
        ...


@runtime_checkable
class Scattering(Fabric, Protocol):
    """A fabric whose all-to-all runs beside what is computed."""

    def start_all_to_all(self, rows: Tensor, sends: Sequence[int], recvs: Sequence[int]) -> tuple[Tensor, Handle]:
        """Start `all_to_all`, and return what arrives once the transfer is over."""
        ...


class Done:
    """A transfer with nothing left to wait for."""

    def wait(self) -> None:
        pass

    def done(self) -> bool:
        return True


class SingleFabric:
    """A group of one rank."""

    def __init__(self) -> None:
        self.rank, self.size, self.sent = 0, 1, 0

    def exchange(self, sends: Sequence[Message], recvs: Sequence[Message]) -> Handle:
        assert not sends, "a single rank has no peer to send to"
        assert not recvs, "a single rank has no peer to receive from"
        return Done()

    def all_gather(self, local: Tensor) -> Tensor:
        return local[None]

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        check_parts(self, whole)
        return whole[0]

    def all_to_all(self, rows: Tensor, sends: Sequence[int], recvs: Sequence[int]) -> Tensor:
        check_counts(self, rows, sends, recvs)
        return rows

    def start_all_to_all(self, rows: Tensor, sends: Sequence[int], recvs: Sequence[int]) -> tuple[Tensor, Handle]:
        return self.all_to_all(rows, sends, recvs), Done()

    def subset(self, ranks: Sequence[int]) -> Self:
        return self


class Members:
    """Some ranks of a fabric, numbered in the order given, over its connections: unlike `subset` it makes no group.

    Their transfers are queued together with those of the whole fabric, and collectives are messages between them.
    """

    def __init__(self, whole: Fabric, ranks: Sequence[int]) -> None:
        self._whole, self._ranks = whole, tuple(ranks)
        self.rank, self.size = self._ranks.index(whole.rank), len(self._ranks)

    @property
    def sent(self) -> int:
        """Bytes that this rank has sent over the whole fabric."""
        return self._whole.sent

    @sent.setter
    def sent(self, value: int) -> None:
        self._whole.sent = value

    def exchange(self, sends: Sequence[Message], recvs: Sequence[Message]) -> Handle:
        sends, recvs = ([(tensor, self._ranks[peer]) for tensor, peer in batch] for batch in (sends, recvs))
        return self._whole.exchange(sends, recvs)

    def all_gather(self, local: Tensor) -> Tensor:
        return all_gather_by_exchange(self, local)

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        check_parts(self, whole)
        # one row of a rank's part for each rank
        rows = self.all_to_all(whole.flatten(1), [1] * self.size, [1] * self.size)
        return rows.sum(0, dtype=whole.dtype).view(whole.shape[1:])

    def all_to_all(self, rows: Tensor, sends: Sequence[int], recvs: Sequence[int]) -> Tensor:
        return all_to_all_by_exchange(self, rows, sends, recvs)

    def subset(self, ranks: Sequence[int]) -> Self:
        return type(self)(self._whole, [self._ranks[rank] for rank in ranks])


def axes_of(grid: Grid, fabric: Fabric) -> tuple[Fabric, ...]:
    """Connect the ranks along each axis of a grid over a fabric's ranks; all of them call it together."""
    return tuple(fabric.subset(grid.members(axis, fabric.rank)) for axis in grid.names)


def largest(fabric: Fabric, device: torch.device, *values: float) -> list[float]:
    """Return the largest of each value over all ranks; all ranks have arrived when it returns."""
    gathered = fabric.all_gather(torch.tensor([0.0, *values], dtype=torch.float64, device=device))
    return gathered.max(dim=0).values.tolist()[1:]


def values_of_all(fabric: Fabric, device: torch.device, values: Sequence[int]) -> list[tuple[int, ...]]:
    """Return every rank's values, in order of rank; the bytes this sends are not counted."""
    before = fabric.sent
    gathered = fabric.all_gather(torch.tensor([list(values)], dtype=torch.int64, device=device))
    fabric.sent = before
    return [tuple(row) for row in gathered.flatten(0, 1).tolist()]


def word_of(text: str) -> int:
    """Return a number of 8 bytes, by which ranks compare a text."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), signed=True)


def texts_of_all(fabric: Fabric, device: torch.device, text: str, size: int) -> list[str]:
    """Return every rank's text as far as it fits into this many bytes, in order of rank; they are not counted."""
    rows = values_of_all(fabric, device, list(text.encode()[:size].ljust(size)))
    return [bytes(row).decode(errors="replace").rstrip() for row in rows]


def size_in_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def check_batch(peers: Peers, sends: Sequence[Message], recvs: Sequence[Message]) -> None:
    """Raise MessageError for a message that no process group takes, whatever the other ranks do."""
    for kind, batch in (("send", sends), ("receive", recvs)):
        for tensor, peer in batch:
            where = f"rank {peers.rank}, {kind} {'to' if kind == 'send' else 'from'} rank {peer}"
            if peer == peers.rank or not 0 <= peer < peers.size:
                raise MessageError(f"{where}: the peer must be another of {peers.size} ranks")
            if not tensor.numel():
                raise MessageError(f"{where}: empty messages are left out, got shape {tuple(tensor.shape)}")
            if not tensor.is_contiguous():
                raise MessageError(
                    f"{where}: messages must be contiguous, got shape {tuple(tensor.shape)} with strides "
                    f"{tensor.stride()}"
                )


def check_pair(peers: Peers, peer: int, sent: Tensor, buffer: Tensor) -> None:
    """Raise MessageError if what rank `peer` sent does not fit the buffer that receives it."""
    if form(sent) != form(buffer):
        raise MessageError(
            f"rank {peers.rank} receives {form(sent)} from rank {peer}, but its buffer is {form(buffer)}"
        )


def form(tensor: Tensor) -> str:
    """Describe what the two sides of a message must agree on: dtype, shape and kind of device."""
    return f"{_dtype(tensor)} {list(tensor.shape)} on {tensor.device.type}"


def row_form(tensor: Tensor) -> str:
    """Describe the rows of a message, however many there are."""
    return f"{_dtype(tensor)} rows of {list(tensor.shape[1:])}"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def check_parts(peers: Peers, whole: Tensor) -> None:
    """Raise MessageError unless `whole` has one part for each rank."""
    if whole.ndim < 1 or len(whole) != peers.size:
        raise MessageError(
            f"rank {peers.rank}: a reduce-scatter takes one part per rank, {peers.size}, got {form(whole)}"
        )


def check_gathered(peers: Peers, whole: Tensor, part: Tensor) -> None:
    """Raise MessageError unless both are contiguous, and `whole` has room for one `part` of each rank."""
    if whole.shape != (peers.size, *part.shape) or form(whole[0]) != form(part):
        raise MessageError(
            f"rank {peers.rank}: a collective of {peers.size} ranks takes one part of each, got {form(whole)} "
            f"for parts of {form(part)}"
        )
    if not (whole.is_contiguous() and part.is_contiguous()):
        raise MessageError(
            f"rank {peers.rank}: tensors of a collective must be contiguous, got strides {whole.stride()}"
        )


def check_counts(peers: Peers, rows: Tensor, sends: Sequence[int], recvs: Sequence[int]) -> None:
    """Raise MessageError unless the counts of an all-to-all are one per rank and add up to the rows."""
    if len(sends) != peers.size or len(recvs) != peers.size or min(*sends, *recvs) < 0:
        raise MessageError(
            f"rank {peers.rank}: an all-to-all takes {peers.size} counts, 0 or more, of rows to send and as many to "
            f"receive, got {list(sends)} and {list(recvs)}"
        )
    if sum(sends) != len(rows) or sends[peers.rank] != recvs[peers.rank]:
        raise MessageError(
            f"rank {peers.rank}: the counts of an all-to-all must add up to its {len(rows)} rows and agree on its own, "
            f"got {list(sends)} to send and {list(recvs)} to receive"
        )


def all_gather_by_exchange(fabric: Fabric, local: Tensor) -> Tensor:
    """Gather as `Fabric.all_gather` does, with one message to each other rank."""
    # as the flat buffer of a process group: room for all, the rank's own part copied into it
    gathered, local = local.new_empty((fabric.size, *local.shape)), local.contiguous()
    gathered[fabric.rank] = local
    others = _others(fabric) if local.numel() else []
    fabric.exchange([(local, peer) for peer in others], [(gathered[peer], peer) for peer in others]).wait()
    return gathered


def all_to_all_by_exchange(fabric: Fabric, rows: Tensor, sends: Sequence[int], recvs: Sequence[int]) -> Tensor:
    """Exchange rows as `Fabric.all_to_all` does, with at most one message to each other rank."""
    arrived, transfer = start_all_to_all_by_exchange(fabric, rows, sends, recvs)
    transfer.wait()
    return arrived


def start_all_to_all_by_exchange(
    fabric: Fabric, rows: Tensor, sends: Sequence[int], recvs: Sequence[int]
) -> tuple[Tensor, Handle]:
    """Start what `all_to_all_by_exchange` does."""
    check_counts(fabric, rows, sends, recvs)
    arrived = rows.new_empty((sum(recvs), *rows.shape[1:]))
    leaving, arriving = rows.split(list(sends)), arrived.split(list(recvs))
    arriving[fabric.rank].copy_(leaving[fabric.rank])
    transfer = fabric.exchange(
        [(leaving[peer].contiguous(), peer) for peer in _others(fabric) if leaving[peer].numel()],
        [(arriving[peer], peer) for peer in _others(fabric) if arriving[peer].numel()],
    )
    return arrived, transfer


def _others(fabric: Fabric) -> list[int]:
    return [peer for peer in range(fabric.size) if peer != fabric.rank]
