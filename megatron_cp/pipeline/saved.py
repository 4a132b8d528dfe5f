"""Activations that autograd saved, away from this rank between a forward and its backward.

What moves is a storage: its bytes leave, it shrinks to zero, grows again and gets its bytes back. Every alias survives
that, since all of them share the storage: views, a stage's input, what a custom function saved. Parameters stay, and so
does what several microbatches have in common, such as cached tables of rotary embeddings.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_cp.comm import Transfer
from megatron_cp.errors import CannotRun
from megatron_cp.pipeline.action import EVICT, LOAD
from megatron_cp.pipeline.channels import Channels
from megatron_cp.pipeline.clock import Clock

StageMicro = tuple[int, int]
Event = torch.cuda.Event | None
# large enough that a link reaches its rate
MEASURED_BYTES = 2**25
ROUNDS = 3


class Mover(Protocol):
    """Where the bytes of storages go. Everything is in the order of what is computed; the host waits for nothing."""

    def evict(self, chunk: StageMicro, storages: Sequence[UntypedStorage]) -> None:
        """Start to copy these storages away."""
        ...

    def settle(self) -> None:
        """Free what has been copied away; what is computed from here on waits for the copies."""
        ...

    def load(self, chunk: StageMicro) -> None:
        """Start to copy the storages of `chunk` back."""
        ...

    def arrived(self, chunk: StageMicro) -> None:
        """Let what is computed from here on wait for the copies back."""
        ...

    def hold(self, chunk: StageMicro) -> int:
        """Keep a chunk of the peer's; return its bytes."""
        ...

    def give(self, chunk: StageMicro) -> int:
        """Send a chunk of the peer's back; return its bytes."""
        ...

    def finish(self) -> None:
        """End the step, in which all that moved away has come back."""
        ...

    def seconds(self, size: int) -> float:
        """Measure moving so many bytes one way; all ranks of the pipeline call it together, between steps."""
        ...


@dataclass
class _Chunk:
    """Storages that one forward saved.

    storages: by identity, all that is not a parameter's
    fixed:    those of them that stay: the stage's output, which is being sent
    size:     bytes that no other chunk kept before
    moved:    bytes that are away
    """

    storages: dict[int, UntypedStorage] = field(default_factory=dict)
    fixed: set[int] = field(default_factory=set)
    size: int = 0
    moved: int = 0

    def stays(self, made: Tensor) -> None:
        """Leave the stage's output where it is."""
        self.fixed.add(made.untyped_storage()._cdata)


class SavedActivations:
    """The activations of one rank's stages, and those that it keeps for its peer.

    device:     that computes; what is saved elsewhere stays there
    parameters: identities of the storages of parameters
    peak:       most bytes at once, in the step that runs or has run last
    moved:      bytes that left in that step
    sizes:      bytes of the largest chunk of each stage in that step
    """

    def __init__(self, mover: Mover, device: torch.device, parameters: Callable[[], Collection[int]]) -> None:
        self.mover, self._device, self._parameters = mover, device, parameters
        self._known: Collection[int] = ()
        self._chunks: dict[StageMicro, _Chunk] = {}
        self._users: Counter[int] = Counter()
        self._lasting: dict[int, StorageWeakRef] = {}
        self._forwards: Counter[int] = Counter()
        self._leaving: list[_Chunk] = []
        self._bytes = self.peak = self.moved = 0
        self.sizes: dict[int, int] = defaultdict(int)

    def begin(self) -> None:
        """Start a step."""
        assert not self._chunks, "the step before left activations behind"
        self._known = self._parameters()
        self.sizes.clear()
        self._bytes = self.peak = self.moved = 0

    @contextmanager
    def recording(self, stage: int, micro: int) -> Iterator[_Chunk]:
        """Record what autograd saves inside as the activations of this stage and microbatch."""
        self._settle()
        chunk = _Chunk()

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known and storage.device == self._device and storage.resizable():
                chunk.storages[storage._cdata] = storage
            # an output that its own node saved would keep itself alive; a leaf keeps its attributes
            return tensor if tensor.grad_fn is None else tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield chunk
        self._keep(stage, micro, chunk)

    def _keep(self, stage: int, micro: int, chunk: _Chunk) -> None:
        for (other, _), kept in self._chunks.items():
            if other == stage:
                # saved for two microbatches: it belongs to neither
                for key in chunk.storages.keys() & kept.storages.keys():
                    self._lasting[key] = StorageWeakRef(chunk.storages[key])
        chunk.size = sum(
            storage.nbytes()
            for key, storage in chunk.storages.items()
            if not self._users[key] and key not in self._lasting
        )
        self._users.update(chunk.storages.keys())
        self._chunks[stage, micro] = chunk
        self._forwards[stage] += 1
        self.sizes[stage] = max(self.sizes[stage], chunk.size)
        self._change(chunk.size)

    def _change(self, by: int) -> None:
        self._bytes += by
        self.peak = max(self.peak, self._bytes)

    def _settle(self) -> None:
        self.mover.settle()
        for chunk in self._leaving:
            self._change(-chunk.moved)
        self._leaving.clear()

    def evict(self, stage: int, micro: int) -> None:
        """Start to move the activations of a microbatch away; they are gone before the next forward."""
        chunk = self._chunks[stage, micro]
        # what lasts is known once a second microbatch has saved it too
        alone = self._forwards[stage] < 2
        storages = [] if alone else [storage for key, storage in chunk.storages.items() if self._moves(key, chunk)]
        self.mover.evict((stage, micro), storages)
        chunk.moved = sum(storage.nbytes() for storage in storages)
        self.moved += chunk.moved
        self._leaving.append(chunk)

    def _moves(self, key: int, chunk: _Chunk) -> bool:
        return (
            self._users[key] == 1
            and key not in self._lasting
            and key not in chunk.fixed
            and chunk.storages[key].nbytes() > 0
        )

    def load(self, stage: int, micro: int) -> None:
        """Start to bring the activations of a microbatch back."""
        self._settle()
        self.mover.load((stage, micro))
        self._change(self._chunks[stage, micro].moved)

    def hold(self, stage: int, micro: int) -> None:
        """Take in what the peer moves away."""
        self._change(self.mover.hold((stage, micro)))

    def give(self, stage: int, micro: int) -> None:
        """Give back what the peer moved away."""
        self._change(-self.mover.give((stage, micro)))

    def use(self, stage: int, micro: int) -> None:
        """Wait for the activations of a microbatch, whose backward comes now, and leave them to it."""
        self.mover.arrived((stage, micro))
        chunk = self._chunks.pop((stage, micro))
        self._users.subtract(chunk.storages.keys())
        self._change(-chunk.size)

    def finish(self) -> None:
        """End the step."""
        self._settle()
        self.mover.finish()
        self._users.clear()
        self._lasting = {key: storage for key, storage in self._lasting.items() if not storage.expired()}


def seconds_per_byte(mover: Mover) -> float:
    """Measure how long a byte moves one way; all ranks of the pipeline call it together, between steps."""
    return median(mover.seconds(MEASURED_BYTES) for _ in range(ROUNDS)) / MEASURED_BYTES


def storages_of(tensors: Sequence[Tensor]) -> set[int]:
    """Return the identities of the tensors' storages."""
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def _bytes_of(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


@dataclass
class _Pinned:
    """Host memory for one storage, and when it may be written again."""

    memory: Tensor
    read: Event = None


class _Loading(NamedTuple):
    buffers: list[_Pinned]
    done: Event


class HostMover:
    """Move to the host's memory: pinned, on one stream each way beside the computation on CUDA, at once elsewhere.

    Buffers are kept for the next chunks, so that memory is pinned in the first steps only.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams = [torch.cuda.Stream(device) for _ in range(2)] if device.type == "cuda" else []
        self._free: dict[int, list[_Pinned]] = defaultdict(list)
        self._leaving: list[tuple[Sequence[UntypedStorage], Event]] = []
        self._away: dict[StageMicro, list[tuple[UntypedStorage, _Pinned]]] = {}
        self._coming: dict[StageMicro, _Loading] = {}

    def evict(self, chunk: StageMicro, storages: Sequence[UntypedStorage]) -> None:
        pairs = [(storage, self._buffer(storage.nbytes())) for storage in storages]
        done: Event = None
        if not self._streams:
            for storage, buffer in pairs:
                buffer.memory.copy_(_bytes_of(storage))
        else:
            stream = self._streams[0]
            stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(stream):
                for storage, buffer in pairs:
                    if buffer.read is not None:
                        stream.wait_event(buffer.read)
                    buffer.memory.copy_(_bytes_of(storage), non_blocking=True)
                done = stream.record_event()
        self._leaving.append((storages, done))
        self._away[chunk] = pairs

    def _buffer(self, size: int) -> _Pinned:
        free = self._free[size]
        if free:
            return free.pop()
        return _Pinned(torch.empty(size, dtype=torch.uint8, pin_memory=bool(self._streams)))

    def settle(self) -> None:
        for storages, done in self._leaving:
            if done is not None:
                # the memory is used again by this stream alone, so that nothing writes it before it is read
                torch.cuda.current_stream(self._device).wait_event(done)
            for storage in storages:
                storage.resize_(0)
        self._leaving.clear()

    def load(self, chunk: StageMicro) -> None:
        pairs = self._away.pop(chunk)
        for storage, buffer in pairs:
            storage.resize_(len(buffer.memory))
        done: Event = None
        if not self._streams:
            for storage, buffer in pairs:
                _bytes_of(storage).copy_(buffer.memory)
        else:
            stream = self._streams[1]
            # earlier computation may still read the memory that the storages were given
            stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(stream):
                for storage, buffer in pairs:
                    _bytes_of(storage).copy_(buffer.memory, non_blocking=True)
                done = stream.record_event()
        self._coming[chunk] = _Loading([buffer for _, buffer in pairs], done)

    def arrived(self, chunk: StageMicro) -> None:
        loading = self._coming.pop(chunk, None)
        if loading is None:
            return
        if loading.done is not None:
            torch.cuda.current_stream(self._device).wait_event(loading.done)
        for buffer in loading.buffers:
            buffer.read = loading.done
            self._free[len(buffer.memory)].append(buffer)

    def hold(self, chunk: StageMicro) -> int:
        raise AssertionError("the host keeps chunks of its own rank only")

    give = hold

    def finish(self) -> None:
        assert not self._away, "activations are still on the host"
        assert not self._coming, "activations came back and were not used"

    def seconds(self, size: int) -> float:
        source = torch.zeros(size, dtype=torch.uint8, device=self._device)
        buffer = self._buffer(size)
        clock = Clock(self._device)
        clock.settle()
        began = clock.mark()
        # there and back, for a link may be slower one way
        buffer.memory.copy_(source, non_blocking=True)
        source.copy_(buffer.memory, non_blocking=True)
        ended = clock.mark()
        clock.settle()
        self._free[size].append(buffer)
        return clock.seconds(began, ended) / 2


class _Sent(NamedTuple):
    handles: list[Transfer]
    storages: Sequence[UntypedStorage]


class _Held(NamedTuple):
    handles: list[Transfer]
    buffers: list[Tensor]


class PeerMover:
    """Move to the rank across the pipeline, one message per storage and none of them joined, which would need memory.

    The sizes of a stage's storages are agreed on once: its first chunk that moves sends them ahead.
    """

    def __init__(self, channels: Channels, rank: int, ranks: int, device: torch.device) -> None:
        self._channels, self._peer, self._device = channels, ranks - 1 - rank, device
        self._first, self._alone = rank < self._peer, rank == self._peer
        self._sizes: dict[int, list[int]] = {}
        self._leaving: list[_Sent] = []
        self._away: dict[StageMicro, tuple[Sequence[UntypedStorage], list[int]]] = {}
        self._coming: dict[StageMicro, list[Transfer]] = {}
        self._held: dict[StageMicro, _Held] = {}
        self._returning: list[_Held] = []

    def evict(self, chunk: StageMicro, storages: Sequence[UntypedStorage]) -> None:
        sizes, agreed = [storage.nbytes() for storage in storages], self._sizes.get(chunk[0])
        if agreed is None:
            self._say(sizes)
            if sizes:
                self._sizes[chunk[0]] = sizes
        elif sizes != agreed:
            raise CannotRun(
                f"activations of stage {chunk[0]} change their sizes between microbatches, from {len(agreed)} "
                f"tensors of {sum(agreed)} bytes to {len(sizes)} of {sum(sizes)}, and a peer cannot know them; "
                f"pass --pp-offload-to host"
            )
        handles = [self._channels.send(self._peer, EVICT, _bytes_of(storage)) for storage in storages]
        self._leaving.append(_Sent(handles, storages))
        self._away[chunk] = storages, sizes

    def _say(self, sizes: list[int]) -> None:
        count = torch.tensor([len(sizes)], device=self._device)
        self._channels.send(self._peer, EVICT, count).wait()
        if sizes:
            self._channels.send(self._peer, EVICT, torch.tensor(sizes, device=self._device)).wait()

    def _hear(self) -> list[int]:
        count = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._channels.receive(self._peer, EVICT, count).wait()
        number = int(count.item())
        if not number:
            return []
        sizes = torch.zeros(number, dtype=torch.int64, device=self._device)
        self._channels.receive(self._peer, EVICT, sizes).wait()
        return [int(size) for size in sizes.tolist()]

    def settle(self) -> None:
        for handles, storages in self._leaving:
            for handle in handles:
                handle.wait()
            for storage in storages:
                storage.resize_(0)
        self._leaving.clear()

    def load(self, chunk: StageMicro) -> None:
        handles = []
        for storage, size in zip(*self._away.pop(chunk), strict=True):
            storage.resize_(size)
            handles.append(self._channels.receive(self._peer, LOAD, _bytes_of(storage)))
        self._coming[chunk] = handles

    def arrived(self, chunk: StageMicro) -> None:
        for handle in self._coming.pop(chunk, ()):
            handle.wait()

    def hold(self, chunk: StageMicro) -> int:
        sizes = self._sizes.get(chunk[0])
        if sizes is None:
            sizes = self._hear()
            if sizes:
                self._sizes[chunk[0]] = sizes
        buffers = [torch.empty(size, dtype=torch.uint8, device=self._device) for size in sizes]
        handles = [self._channels.receive(self._peer, EVICT, buffer) for buffer in buffers]
        self._held[chunk] = _Held(handles, buffers)
        return sum(sizes)

    def give(self, chunk: StageMicro) -> int:
        handles, buffers = self._held.pop(chunk)
        for handle in handles:
            handle.wait()
        sent = [self._channels.send(self._peer, LOAD, buffer) for buffer in buffers]
        self._returning = [held for held in self._returning if not all(handle.done() for handle in held.handles)]
        self._returning.append(_Held(sent, buffers))
        return sum(map(len, buffers))

    def finish(self) -> None:
        for handles, _ in self._returning:
            for handle in handles:
                handle.wait()
        self._returning.clear()
        assert not self._away, "activations are still with the peer"
        assert not self._held, "activations of the peer were not given back"
        assert not self._coming, "activations came back and were not used"

    def seconds(self, size: int) -> float:
        if self._alone:
            return 0.0
        tensor = torch.zeros(size, dtype=torch.uint8, device=self._device)
        clock = Clock(self._device)
        clock.settle()
        began = perf_counter()
        # there and back, on the channels of the rank that comes first
        if self._first:
            self._channels.send(self._peer, EVICT, tensor).wait()
            self._channels.receive(self._peer, LOAD, tensor).wait()
        else:
            self._channels.receive(self._peer, EVICT, tensor).wait()
            self._channels.send(self._peer, LOAD, tensor).wait()
        clock.settle()
        return (perf_counter() - began) / 2
