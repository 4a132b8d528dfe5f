"""Tokens in host memory, copied beside the computation and ordered by events; the host itself never waits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Stretches = tuple[slice, ...]
Event = torch.cuda.Event | None


@torch.library.custom_op("megatron_cp::host_empty", mutates_args=())
def host_empty(like: Tensor, tokens: int) -> Tensor:
    """Allocate host memory for `tokens` tokens such as `like` has: pinned for a GPU's tensors, plain otherwise.

    A custom operation, so that a count of live memory can tell the store's from the computation's.
    """
    device = torch.device("cpu") if like.is_cuda else like.device
    return torch.empty((tokens, *like.shape[1:]), dtype=like.dtype, device=device, pin_memory=like.is_cuda)


@host_empty.register_fake
def _(like: Tensor, tokens: int) -> Tensor:
    return like.new_empty((tokens, *like.shape[1:]))


HOST_EMPTY = torch.ops.megatron_cp.host_empty.default


@dataclass(frozen=True)
class HostRead:
    """A copy from the host in flight."""

    tensor: Tensor
    event: Event

    def wait(self) -> Tensor:
        """Return the tokens; what is computed from here on waits for them."""
        if self.event is not None:
            torch.cuda.current_stream(self.tensor.device).wait_event(self.event)
        return self.tensor


class HostTransfers:
    """The copies between one device and the host, one stream each way; without a GPU they happen at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._streams = [torch.cuda.Stream(device) for _ in range(2)] if device.type == "cuda" else []

    def down(self, tensor: Tensor, copies: Sequence[tuple[Tensor, slice]]) -> Event:
        """Copy these stretches of `tensor` to host memory once it is computed; the event says when they are there."""
        if not self._streams:
            for host, tokens in copies:
                host.copy_(tensor[tokens])
            return None
        stream, tensor = self._streams[0], tensor.contiguous()
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for host, tokens in copies:
                host.copy_(tensor[tokens], non_blocking=True)
        # its memory is not reused before it is read
        tensor.record_stream(stream)
        return stream.record_event()

    def up(self, hosts: Sequence[Tensor], after: Sequence[Event]) -> HostRead:
        """Copy from host memory, one after the other, after these events and beside what is computed after the call."""
        here = hosts[0].new_empty((sum(map(len, hosts)), *hosts[0].shape[1:]), device=self.device)
        pieces = list(zip(here.split([len(host) for host in hosts]), hosts, strict=True))
        if not self._streams:
            for piece, host in pieces:
                piece.copy_(host)
            return HostRead(here, None)
        stream = self._streams[1]
        # earlier computation may still read the memory that `here` was given
        stream.wait_stream(torch.cuda.current_stream(self.device))
        for event in after:
            if event is not None:
                stream.wait_event(event)
        with torch.cuda.stream(stream):
            for piece, host in pieces:
                piece.copy_(host, non_blocking=True)
        return HostRead(here, stream.record_event())

    def settle(self) -> None:
        """Let everything computed from here on, in later passes too, wait for the copies to the host."""
        for stream in self._streams:
            torch.cuda.current_stream(self.device).wait_stream(stream)


class HostStore:
    """Tokens in host memory; `memory` [tokens ...] may be that of a store of an earlier pass."""

    def __init__(self, memory: Tensor, transfers: HostTransfers) -> None:
        self.memory = memory
        self._transfers = transfers
        self._written: dict[slice, Event] = {}

    @classmethod
    def like(cls, x: Tensor, tokens: int, transfers: HostTransfers) -> "HostStore":
        """Make a store for `tokens` tokens such as x has."""
        return cls(HOST_EMPTY(x, tokens), transfers)

    def put(self, x: Tensor, places: Sequence[tuple[slice, slice]]) -> None:
        """Start to copy tokens of x to the host, to the first slice of a place from the second; x may be dropped."""
        event = self._transfers.down(x, [(self.memory[there], here) for there, here in places])
        self._written.update((there, event) for there, _ in places)

    def get(self, tokens: Stretches) -> HostRead:
        """Start to copy these tokens from the host, after what was put there."""
        events = [
            event
            for put, event in self._written.items()
            if any(put.start < wanted.stop and wanted.start < put.stop for wanted in tokens)
        ]
        return self._transfers.up([self.memory[wanted] for wanted in tokens], events)

    def has(self, tokens: Stretches) -> bool:
        """True if exactly these stretches were put here by this store."""
        return all(stretch in self._written for stretch in tokens)


def visits(wanted: Sequence[Stretches], stores: list[HostStore], partial: list[HostStore]) -> Iterator[list[Tensor]]:
    """Yield the wanted tokens of every store, and of the `partial` ones if they have them; the next are in flight.

    Two sets of tokens of each store are alive at a time: a list is emptied when the next one is asked for.
    """

    def fetch(tokens: Stretches) -> list[HostRead]:
        return [store.get(tokens) for store in (*stores, *(store for store in partial if store.has(tokens)))]

    arriving = fetch(wanted[0])
    for after in (*wanted[1:], None):
        here = [arrival.wait() for arrival in arriving]
        arriving = [] if after is None else fetch(after)
        yield here
        here.clear()
