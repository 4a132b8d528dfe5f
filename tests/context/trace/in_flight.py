"""Uses of memory while messages are in flight, and operations for which a host would wait for its device."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megatron_cp.comm import Done, Handle
from megatron_cp.comm.fabric import all_gather_by_exchange, all_to_all_by_exchange, check_batch, check_gathered
from megatron_cp.context.merge import accumulator_dtype

# they reserve memory and leave its content
RESERVING = "empty empty_like new_empty empty_strided new_empty_strided host_empty".split()
# their result, or its size, is known to the host only when the device has come to them
SYNCHRONISING = """
_local_scalar_dense equal is_nonzero item masked_select nonzero repeat_interleave unique _unique2 unique_consecutive
unique_dim
""".split()


class Span(NamedTuple):
    """Bytes of a storage that a message of a batch is in; `received` if it comes in there."""

    batch: int
    received: bool
    start: int
    stop: int


class Watch(TorchDispatchMode):
    """Notes in `found` each use of memory that a message in flight may not be used for, and each synchronisation.

    A send may be read, not written; a receive neither. Storages are watched op by op, so that views are no way around.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.operations = 0
        self.in_flight: dict[int, list[Span]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.operations += 1
        if name in SYNCHRONISING:
            self.found.append(f"{name} waits for the device")
        elif not func.is_view and name not in RESERVING:
            for declared, given in zip(func._schema.arguments, args, strict=False):
                writes = declared.alias_info is not None and declared.alias_info.is_write
                for leaf in tree_iter(given):
                    self.touch(leaf, writes, name)
        return func(*args, **(kwargs or {}))

    def touch(self, value: Any, writes: bool, name: str) -> None:
        """Note a use of a tensor by the operation of this name."""
        if not isinstance(value, Tensor) or not value.numel():
            return
        start, stop = bytes_of(value)
        for span in self.in_flight.get(value.untyped_storage()._cdata, ()):
            if start < span.stop and span.start < stop and (writes or span.received):
                kind = "receive" if span.received else "send"
                self.found.append(f"{name} {'writes' if writes else 'reads'} a {kind} of batch {span.batch} in flight")


def bytes_of(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor in its storage, and the one after its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    first = tensor.storage_offset()
    return first * tensor.element_size(), (first + last + 1) * tensor.element_size()


class WatchedFabric:
    """A rank of `members` that sends nothing and remembers which memory is in flight."""

    def __init__(self, watch: Watch, members: tuple[int, ...], me: int, per_node: int | None = None) -> None:
        self._watch, self._members, self._per_node = watch, members, per_node
        self.rank, self.size, self.sent, self._batches = members.index(me), len(members), 0, 0

    def exchange(self, sends: Sequence[tuple[Tensor, int]], recvs: Sequence[tuple[Tensor, int]]) -> Handle:
        check_batch(self, sends, recvs)
        self._batches += 1
        for batch, received in ((sends, False), (recvs, True)):
            for tensor, _ in batch:
                self._watch.touch(tensor, received, "exchange")
        spans = list(self._spans(sends, False)) + list(self._spans(recvs, True))
        return _InFlight(self._watch, spans) if spans else Done()

    def _spans(self, batch: Sequence[tuple[Tensor, int]], received: bool) -> Iterator[tuple[Tensor, Span]]:
        for tensor, _ in batch:
            span = Span(self._batches, received, *bytes_of(tensor))
            self._watch.in_flight.setdefault(tensor.untyped_storage()._cdata, []).append(span)
            yield tensor, span

    def all_gather(self, local: Tensor) -> Tensor:
        return all_gather_by_exchange(self, local)

    @property
    def nodes(self) -> tuple[int, ...]:
        return tuple(member // self._per_node if self._per_node else 0 for member in self._members)

    def start_all_gather(self, gathered: Tensor, local: Tensor) -> Handle:
        check_gathered(self, gathered, local)
        return self._collective(local, gathered)

    def start_reduce_scatter(self, part: Tensor, whole: Tensor) -> Handle:
        check_gathered(self, whole, part)
        return self._collective(whole, part)

    def _collective(self, read: Tensor, written: Tensor) -> Handle:
        self._batches += 1
        self._watch.touch(read, False, "collective")
        self._watch.touch(written, True, "collective")
        return _InFlight(self._watch, [*self._spans([(read, 0)], False), *self._spans([(written, 0)], True)])

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        self._watch.touch(whole, False, "reduce_scatter")
        return whole.new_empty(whole.shape[1:])

    def all_to_all(self, rows: Tensor, sends: Sequence[int], recvs: Sequence[int]) -> Tensor:
        return all_to_all_by_exchange(self, rows, sends, recvs)

    def subset(self, ranks: Sequence[int]) -> "WatchedFabric":
        members = tuple(self._members[rank] for rank in ranks)
        return WatchedFabric(self._watch, members, self._members[self.rank], self._per_node)


class _InFlight:
    """One batch; it holds its tensors, as a process group does, so that no storage is reused."""

    def __init__(self, watch: Watch, spans: list[tuple[Tensor, Span]]) -> None:
        self._watch, self._spans = watch, spans

    def wait(self) -> None:
        for tensor, span in self._spans:
            self._watch.in_flight[tensor.untyped_storage()._cdata].remove(span)
        self._spans = []

    def done(self) -> bool:
        return not self._spans


class WatchedKernel:
    """Results as large as a fused kernel's, which reads all that it is given."""

    name = "watched"

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        self._read(q, k, v)
        return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=accumulator_dtype(q))

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        self._read(dout, q, k, v, out, lse)
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    def _read(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            self._watch.touch(tensor, False, "the kernel")
