"""Peak of live tensor memory of a piece of code, on any device."""

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megatron_cp.context.host_store import HOST_EMPTY


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations inside the block make and that are still alive: `now`, and at most `peak`.

    Storages that existed before the block (inputs) are not counted, nor is memory of the host store, which on a CPU is
    memory as any other; buffers of libraries are not seen.
    """

    def __init__(self, *inputs: torch.Tensor) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in inputs}
        # references, so that no address counts as the store's when another storage has come to lie there
        self._host: dict[int, StorageWeakRef] = {}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage(), func is HOST_EMPTY)
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        self.now = sum(size for _, size in self._live.values())
        self.peak = max(self.peak, self.now)
        return result

    def _note(self, storage: torch.UntypedStorage, host: bool) -> None:
        if host:
            self._host[storage._cdata] = StorageWeakRef(storage)
        elif storage._cdata not in self._known and storage._cdata not in self._host:
            self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
