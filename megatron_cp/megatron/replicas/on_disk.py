"""The distributed optimizer's state in files, as ZeRO-Infinity keeps it.

Megatron's optimizer reads and writes its shards of moments and main weights as tensors: for the model's weights, for
checkpoints. They are tensors still, mapped from files, and only the step of Adam goes over them in another way.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch

from megatron_cp.comm import objects_of_all
from megatron_cp.errors import CannotRun
from megatron_cp.megatron.run import Settings, say
from megatron_cp.replicas.on_disk import StateOnDisk

DISK = "megatron_cp_state_on_disk"
"""Attribute of a distributed optimizer that holds its StateOnDisk."""


def put_on_disk(old: Callable[..., Any], settings: Settings, *args: Any, **kwargs: Any) -> Any:
    """Build Megatron's optimizer and put its state into files.

    Raises RuntimeError on all ranks where the disk of one has no room.
    """
    optimizer = old(*args, **kwargs)
    directory = settings.optimizer_state.dir
    if directory is None:
        return optimizer
    fault = ""
    try:
        for each in _sharded(optimizer):
            weights = _main_weights(each) if settings.optimizer_state.weights else []
            setattr(each, DISK, StateOnDisk(each.optimizer, directory, weights=weights))
    except OSError as error:
        fault = error.strerror or str(error)
    faults = {rank: text for rank, text in enumerate(objects_of_all(fault)) if text}
    if faults:
        ranks = ", ".join(f"rank {rank}: {text}" for rank, text in faults.items())
        raise CannotRun(
            f"--optimizer-state-dir {directory} cannot hold the optimizer's state ({ranks}); give a directory on a "
            f"disk with room, or more data-parallel ranks"
        )
    found = sum(getattr(each, DISK).bytes for each in _sharded(optimizer))
    say(f"--optimizer-state-dir {directory}: {found:,} bytes of this rank's optimizer state are in files")
    return optimizer


def take_gradients(old: Callable[..., None], optimizer: Any) -> None:
    """Hang gradients on the main weights, also where these are in a file and the gradients on a GPU."""
    disk = getattr(optimizer, DISK, None)
    device = torch.device(torch.cuda.current_device())
    with disk.weights_on(device) if disk is not None else nullcontext():
        old(optimizer)


def _sharded(optimizer: Any) -> Iterator[Any]:
    """Yield the distributed optimizers, those of no parameters left out."""
    for each in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not each.is_stub_optimizer:
            yield each


def _main_weights(optimizer: Any) -> list[torch.Tensor]:
    """Return the float32 copies of a shard's bf16 or fp16 weights; weights of float32 are the model's own."""
    return [weight for group in optimizer.shard_fp32_from_float16_groups for weight in group if weight is not None]
