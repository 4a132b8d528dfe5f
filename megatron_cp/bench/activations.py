"""How much memory activations take, step by step of a pipeline."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_cp.pipeline.action import COMPUTE, Action
from megatron_cp.pipeline.split_backward import WeightQueue


class LiveActivations:
    """Bytes that graphs and waiting weight gradients keep alive after each action: what peaks of schedules count.

    Inside `counting` every tensor that autograd saves or that waits for a W is noted; a storage counts once, until it
    is freed, whoever holds it. What is there anyway, `known`, does not count: weights and batches.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.after: list[tuple[Action, int]] = []

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Around a step."""
        put = WeightQueue.put

        def noted(queue: WeightQueue, run: Callable[..., None], *keeps: Tensor) -> None:
            for tensor in keeps:
                self._note(tensor)
            put(queue, run, *keeps)

        with (
            patch.object(WeightQueue, "put", noted),
            torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor),
        ):
            yield

    @contextmanager
    def observe(self, action: Action) -> Iterator[None]:
        """What an executor puts around every action: the bytes alive at its end go into `after`."""
        yield
        if action.kind in COMPUTE:
            self.after.append((action, self.now()))

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())

    def now(self) -> int:
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        return sum(size for _, size in self._live.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        self._note(tensor)
        # an output that its own node saved would keep itself alive
        return tensor.detach()


def changes(after: Iterable[tuple[Action, int]]) -> Iterator[tuple[Action, int]]:
    """How many bytes each action added, or freed."""
    before = 0
    for action, now in after:
        yield action, now - before
        before = now
