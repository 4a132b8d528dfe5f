"""The optimizer's state in files: equal bits first, then time and the device's memory beside the state in memory."""

import tempfile
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from gpu_check.table import Row
from megatron_cp.replicas.on_disk import StateOnDisk

STEPS = 4
# parameters of a GPU and of a CPU, and the elements that are stepped together
SIZES = {"cuda": ((1 << 26, 1000, 3 << 22), 1 << 22), "cpu": ((5000, 77), 1000)}


def state_files(device: str) -> Iterator[Row]:
    """Step each Adam that there is, with its state in memory, with moments in files, and with weights in files too."""
    for name, kind in _adams():
        plain = _stepped(device, kind)
        for case, weights in (("moments in files", False), ("moments and weights in files", True)):
            with tempfile.TemporaryDirectory() as folder:
                found = _stepped(device, kind, folder, weights)
            same = all(torch.equal(one, other) for one, other in zip(found[0], plain[0], strict=True))
            figures = {"ms": found[1] * 1e3, "in memory ms": plain[1] * 1e3, "files MiB": found[2] / 2**20}
            if device == "cuda":
                figures |= {"GPU MiB": found[3] / 2**20, "in memory GPU MiB": plain[3] / 2**20}
            yield Row(f"{name}, {case}", figures, "ok" if same else "wrong")


def _adams() -> Iterator[tuple[str, Callable[..., Any]]]:
    yield "torch's AdamW", torch.optim.AdamW
    try:
        from transformer_engine.pytorch.optimizers import FusedAdam
    except ImportError:
        return
    yield "TransformerEngine's FusedAdam", FusedAdam


def _stepped(
    device: str, kind: Callable[..., Any], folder: str | None = None, weights: bool = False
) -> tuple[list[Tensor], float, int, int]:
    """Return the weights after some steps, the seconds of the last one, bytes in files and bytes on the device."""
    sizes, piece = SIZES[device]
    generator = torch.Generator(device).manual_seed(0)
    parameters = [torch.randn(size, device=device, generator=generator) for size in sizes]
    optimizer = kind([{"params": parameters}], lr=1e-3)
    moved = parameters if weights else ()
    disk = StateOnDisk(optimizer, folder, weights=moved, piece=piece) if folder else None
    seconds = 0.0
    for _ in range(STEPS):
        gradients = [torch.randn(size, device=device, generator=generator) for size in sizes]
        if disk is not None:
            with disk.weights_on(torch.device(device)):
                _hang(parameters, gradients)
        else:
            _hang(parameters, gradients)
        began = perf_counter()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = perf_counter() - began
    held = torch.cuda.memory_allocated() if device == "cuda" else 0
    return [each.detach().cpu().clone() for each in parameters], seconds, disk.bytes if disk else 0, held


def _hang(parameters: list[Tensor], gradients: list[Tensor]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
