"""Measured orders of kernels, by the compute capability of the GPU; figures come from `megatron-cp bench kernels`."""

from typing import NamedTuple

import torch


class Measured(NamedTuple):
    """Kernels and op that were fastest on one generation of GPUs.

    order:  kernels, fastest first; the others follow in the registry's order
    op:     the op of kernel "torch", "flash" or "cuDNN"; empty where each shape is measured at its first call
    source: GPU, versions, command and date
    """

    capability: tuple[int, int]
    order: tuple[str, ...]
    op: str
    source: str


# no GPU has been measured yet
MEASURED: tuple[Measured, ...] = ()


def measured(device: str) -> Measured | None:
    """Return the entry for this machine's GPU, or None."""
    found = capability(device)
    return next((entry for entry in MEASURED if entry.capability == found), None)


def capability(device: str) -> tuple[int, int] | None:
    """Return the compute capability of this machine's GPU; None without one."""
    return torch.cuda.get_device_capability() if device == "cuda" and torch.cuda.is_available() else None


def basis(device: str) -> str:
    """Return on which figures the order of kernels rests, empty where there is no GPU to speak of."""
    found, entry = capability(device), measured(device)
    if found is None:
        return ""
    if entry is not None:
        return f"in the order measured on {entry.source}"
    return f"no kernels were measured on compute capability {found[0]}.{found[1]}, in the registry's order"
