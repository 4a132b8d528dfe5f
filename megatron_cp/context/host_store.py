"""Where chunks wait in host memory: copied beside the computation, ordered by events; the host itself never waits."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@torch.library.custom_op("megatron_cp::host_empty", mutates_args=())
def host_empty(like: Tensor, chunks: int) -> Tensor:
    """Room for `chunks` tensors shaped like `like`: pinned for a GPU's tensors, plain memory for any other device.

    An operation of its own, so that whoever counts live memory can tell the store's from the computation's.
    """
    device = torch.device("cpu") if like.is_cuda else like.device
    return torch.empty((chunks, *like.shape), dtype=like.dtype, device=device, pin_memory=like.is_cuda)


@host_empty.register_fake
def _(like: Tensor, chunks: int) -> Tensor:
    return like.new_empty((chunks, *like.shape))


HOST_EMPTY = torch.ops.megatron_cp.host_empty.default


@dataclass(frozen=True)
class Arrival:
    """A chunk on its way from the host."""

    tensor: Tensor
    event: torch.cuda.Event | None

    def wait(self) -> Tensor:
        """The chunk; what is computed from here on waits for it."""
        if self.event is not None:
            torch.cuda.current_stream(self.tensor.device).wait_event(self.event)
        return self.tensor


class Lanes:
    """The copies between one device and the host, one stream each way; without a GPU they happen at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._streams = [torch.cuda.Stream(device) for _ in range(2)] if device.type == "cuda" else []

    def down(self, host: Tensor, tensor: Tensor) -> torch.cuda.Event | None:
        """Copy to the host once `tensor` is computed; the event says when it is there."""
        if not self._streams:
            host.copy_(tensor)
            return None
        stream, tensor = self._streams[0], tensor.contiguous()
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            host.copy_(tensor, non_blocking=True)
        # its memory is not given to anybody else before it is read
        tensor.record_stream(stream)
        return stream.record_event()

    def up(self, host: Tensor, written: torch.cuda.Event | None) -> Arrival:
        """Copy from the host once it has been `written`, beside whatever is computed after this call."""
        here = torch.empty_like(host, device=self.device)
        if not self._streams:
            return Arrival(here.copy_(host), None)
        stream = self._streams[1]
        # earlier computation may still read the memory that `here` was given
        stream.wait_stream(torch.cuda.current_stream(self.device))
        if written is not None:
            stream.wait_event(written)
        with torch.cuda.stream(stream):
            here.copy_(host, non_blocking=True)
        return Arrival(here, stream.record_event())

    def settle(self) -> None:
        """What is computed from here on, in other passes too, waits for the copies to the host."""
        for stream in self._streams:
            torch.cuda.current_stream(self.device).wait_stream(stream)


class HostStore:
    """Equally shaped chunks in host memory; `memory` [chunks ...] may come from another store of an earlier pass."""

    def __init__(self, memory: Tensor, lanes: Lanes) -> None:
        self.memory = memory
        self._lanes = lanes
        self._written: dict[int, torch.cuda.Event | None] = {}

    @classmethod
    def like(cls, chunk: Tensor, chunks: int, lanes: Lanes) -> "HostStore":
        """Room for `chunks` tensors shaped like `chunk`."""
        return cls(HOST_EMPTY(chunk, chunks), lanes)

    def put(self, chunk: int, tensor: Tensor) -> None:
        """Start to copy `tensor` to the host; it may be dropped at once."""
        self._written[chunk] = self._lanes.down(self.memory[chunk], tensor)

    def get(self, chunk: int) -> Arrival:
        """Start to copy a chunk from the host, after what was put there last."""
        return self._lanes.up(self.memory[chunk], self._written.get(chunk))

    def has(self, chunk: int) -> bool:
        """Whether this store's own `put` was called for the chunk."""
        return chunk in self._written


def visits(chunks: list[int], stores: list[HostStore], partial: list[HostStore]) -> Iterator[tuple[int, list[Tensor]]]:
    """Each of `chunks` from every store, and from the `partial` ones where they have it; the next one is on its way.

    Two chunks of each store are alive at a time; the list is emptied when the next one is asked for.
    """

    def fetch(chunk: int) -> list[Arrival]:
        return [store.get(chunk) for store in (*stores, *(store for store in partial if store.has(chunk)))]

    arriving = fetch(chunks[0])
    for chunk, after in zip(chunks, [*chunks[1:], None], strict=True):
        here = [arrival.wait() for arrival in arriving]
        arriving = [] if after is None else fetch(after)
        yield chunk, here
        here.clear()
