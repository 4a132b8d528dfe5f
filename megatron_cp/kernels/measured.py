"""Measured orders of kernels, by the compute capability of the GPU.

Figures come from `scripts/gpu_check.sh` or `megatron-cp bench kernels`.
"""

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


MEASURED = (
    # 16K tokens, 32 query and 8 KV heads of 128, TFLOP/s forward and backward, causal: cuDNN 647 and 549, flash-attn 4
    # 702 and 580, torch's flash 293 and 296. At 4K: 542 and 394, 374 and 366, 268 and 236; flash-attn 4 also compiles
    # each shape's kernels at its first call, some seconds each
    Measured(
        (9, 0),
        ("torch", "flash-4"),
        "cuDNN",
        "an H100 80GB HBM3, torch 2.11.0, cuDNN 9.19, flash-attn 4.0.0b36, by scripts/gpu_check.sh, 2026-11-27",
    ),
)


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
