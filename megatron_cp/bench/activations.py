"""Measure the memory of activations after every action of a pipeline step."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_cp.pipeline.action import COMPUTE, Action
from megatron_cp.pipeline.split_backward import WeightQueue


class LiveActivations:
    """Bytes that graphs and waiting weight gradients keep alive after each action, as a schedule's peak counts them.

    Inside `counting` every tensor that autograd saves or that waits for a W is noted. A storage counts once, until it
    is freed. `known` tensors (weights and batches) are left out.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.after: list[tuple[Action, int]] = []

    @contextmanager
    def counting(self, queue: WeightQueue) -> Iterator[None]:
        """Note tensors during one step, whose split weight gradients wait in `queue`."""
        assert queue.on_put is None, "another measurement observes this queue"
        queue.on_put = self._note
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
                yield
        finally:
            queue.on_put = None

    @contextmanager
    def observe(self, action: Action) -> Iterator[None]:
        """Record in `after` the bytes alive at the end of one action; an executor enters this around each."""
        yield
        if action.kind in COMPUTE:
            self.after.append((action, self.now()))

    def _note(self, tensors: Iterable[Tensor]) -> None:
        for storage in (tensor.untyped_storage() for tensor in tensors):
            if storage.data_ptr() not in self._known:
                self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())

    def now(self) -> int:
        """Return the bytes alive at this moment."""
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        return sum(size for _, size in self._live.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        self._note([tensor])
        # detached: an output that its own node saved would keep itself alive
        return tensor.detach()


def changes(after: Iterable[tuple[Action, int]]) -> Iterator[tuple[Action, int]]:
    """Yield each action with the bytes that it added, negative where it freed some."""
    before = 0
    for action, now in after:
        yield action, now - before
        before = now
