"""Versions of a rank's weights, for schedules whose steps end without a flush (PipeDream, arXiv:1806.03377).

A graph in flight keeps its weights by their storage, as views and transposes do, or by the parameter itself, which then
must have the same values again. So no update writes into storage that a graph may know: the newest values are copied
into the storage of a version that no batch needs any more, that becomes the parameters' own, and the optimizer updates
them in place, as ever. Before a forward or a backward the parameters point to the version of its batch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megatron_cp.errors import Refused


class Storage(Protocol):
    """Where a rank's weights lie: one tensor after another."""

    def tensors(self) -> list[Tensor]:
        """Return the tensors that hold the weights now."""
        ...

    def show(self, tensors: Sequence[Tensor]) -> None:
        """Let the parameters point into these."""
        ...

    def update_in(self, tensors: Sequence[Tensor]) -> None:
        """Let the parameters point into these, and the optimizer write there."""
        ...


class OwnStorage:
    """Parameters with a tensor each, which the optimizer writes to."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters

    def tensors(self) -> list[Tensor]:
        return [parameter.data for parameter in self._parameters]

    def show(self, tensors: Sequence[Tensor]) -> None:
        for parameter, tensor in zip(self._parameters, tensors, strict=True):
            parameter.data = tensor

    def update_in(self, tensors: Sequence[Tensor]) -> None:
        self.show(tensors)


class BufferStorage:
    """Parameters in the buffers that Megatron's distributed optimizer gathers weights in."""

    def __init__(self, chunks: Sequence[Any]) -> None:
        self._buffers = [buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        self._groups = [
            group for chunk in chunks for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups)
        ]

    def tensors(self) -> list[Tensor]:
        return [buffer.param_data for buffer in self._buffers]

    def show(self, tensors: Sequence[Tensor]) -> None:
        for buffer, flat in zip(self._buffers, tensors, strict=True):
            for parameter, (start, end, _) in buffer.param_index_map.items():
                parameter.data = flat[start:end].view(parameter.shape)

    def update_in(self, tensors: Sequence[Tensor]) -> None:
        self.show(tensors)
        for buffer, flat in zip(self._buffers, tensors, strict=True):
            buffer.param_data = flat
            for bucket in buffer.buckets:
                bucket.param_data = flat[bucket.offset : bucket.offset + bucket.param_data.numel()]
        for group in self._groups:
            # views of the buffers before, into which weights would be gathered
            group.cached_param_buffer_shard_list = [None] * len(group.buckets)


class WeightVersions:
    """Weights of a rank after each of the updates that batches in flight need, by the number of updates.

    behind: updates that the weights of a batch lack
    newest: number of updates that the parameters have had
    """

    def __init__(self, storage: Storage, parameters: Sequence[nn.Parameter], behind: int, newest: int) -> None:
        self.behind, self.newest, self._first = behind, newest, newest
        self._storage, self._parameters = storage, tuple(parameters)
        self._kept = {newest: storage.tensors()}
        self._shown = newest
        self._counters: Any = None

    @property
    def kept(self) -> tuple[int, ...]:
        """The versions that are there, oldest first."""
        return tuple(sorted(self._kept))

    def of_batch(self, batch: int) -> int:
        """Return the version that a batch runs with: the oldest one for the first batches."""
        return max(batch - self.behind, self._first)

    def show(self, version: int) -> None:
        """Let the parameters have the values of a version."""
        if version != self._shown:
            self._storage.show(self._kept[version])
            self._shown = version

    @contextmanager
    def shown(self, version: int) -> Iterator[None]:
        """Let the parameters have the values of a version inside the context."""
        before = self._shown
        self.show(version)
        try:
            yield
        finally:
            self.show(before)

    def add_older(self, count: int) -> list[int]:
        """Make room for `count` versions before the oldest, with its values; return them, oldest first."""
        made = list(range(self._first - count, self._first))
        for version in made:
            self._kept[version] = [tensor.clone() for tensor in self._kept[self._first]]
        self._first -= count
        return made

    def drop(self, versions: Sequence[int]) -> None:
        """Forget versions that were made in vain."""
        for version in versions:
            del self._kept[version]
        self._first = min(self._kept)

    def before_update(self) -> None:
        """Give the next version storage of its own with the newest values, where the optimizer will update them."""
        self.show(self.newest)
        # the next batch's version is the oldest that anything in flight needs
        needless = [version for version in self.kept if version < self.of_batch(self.newest + 1)]
        free = [self._kept.pop(version) for version in needless]
        newest = self._kept.get(self.newest)
        if newest is None:
            # no batch needs it: the update may write over it
            (room,) = free[-1:]
        else:
            room = free[0] if free else [torch.empty_like(tensor) for tensor in newest]
            for new, old in zip(room, newest, strict=True):
                new.copy_(old)
        self.newest += 1
        self._kept[self.newest] = room
        self._storage.update_in(room)
        self._shown = self.newest
        # fp32 parameters are updated in place, and autograd would believe that it was what graphs have saved
        self._counters = torch.autograd._unsafe_preserve_version_counter(self._parameters)

    def after_update(self) -> None:
        """Tell autograd that what graphs have saved is as it was."""
        if self._counters is not None:
            self._counters.__exit__(None, None, None)
            self._counters = None


def versions_of(chunks: Sequence[Any], behind: int, newest: int) -> WeightVersions:
    """Return the versions of these model chunks' weights, of which only the newest is there.

    behind: updates that the weights of a batch lack on this rank
    newest: number of updates so far
    """
    parameters = [weight for chunk in chunks for weight in chunk.parameters() if weight.requires_grad]
    return WeightVersions(_storage(chunks, parameters), parameters, behind, newest)


def _storage(chunks: Sequence[Any], parameters: Sequence[nn.Parameter]) -> Storage:
    # Megatron's wrapper has a list where a module has a method
    wrapped = all(isinstance(chunk.buffers, list) for chunk in chunks)
    if not (wrapped and all(buffer.param_data is not None for chunk in chunks for buffer in chunk.buffers)):
        return OwnStorage(parameters)
    if any(parameter.dtype == torch.float32 for parameter in parameters):
        raise Refused(
            "--use-distributed-optimizer updates float32 weights in one place, and this schedule keeps several "
            "versions; leave it out, or take a model whose weights are all in bfloat16"
        )
    return BufferStorage(chunks)
