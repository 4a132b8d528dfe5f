"""Choose the product of a rank's experts for a device and a dtype."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from megatron_cp.errors import CannotRun
from megatron_cp.experts import AUTO, GROUPED_MM, LOOP, PRODUCTS
from megatron_cp.experts.grouped_mm import lacking, misaligned, name_of

CAPABILITY = (8, 0)
"""The least compute capability that torch's grouped kernel is written for."""


class ChosenProduct(NamedTuple):
    """The name of a product, and why `auto` has taken it; empty where it was asked for."""

    name: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.why})" if self.why else self.name


def choose(asked: str, device: str, dtype: torch.dtype, widths: Sequence[int]) -> ChosenProduct:
    """Return the product that is asked for, or the one that `auto` takes.

    device: its type, such as "cpu"
    widths: features of the linears' inputs and outputs on this rank
    Raises CannotRun where the one that is asked for cannot run.
    """
    if asked != AUTO and PRODUCTS.get(asked).name == LOOP:
        return ChosenProduct(LOOP)
    reason = misaligned(widths, dtype) or lacking(device, dtype)
    if asked != AUTO:
        if reason:
            raise CannotRun(f"--moe-grouped-product {GROUPED_MM} {reason}; use {AUTO} or {LOOP}")
        return ChosenProduct(GROUPED_MM)
    if reason := f"{GROUPED_MM} {reason}" if reason else slower(device, dtype):
        return ChosenProduct(LOOP, f"{AUTO}: {reason}")
    return ChosenProduct(GROUPED_MM, f"{AUTO}: torch has a kernel for {name_of(dtype)} on this GPU")


def slower(device: str, dtype: torch.dtype) -> str:
    """Say why torch's grouped product is slower than a loop where it runs; empty where it has a kernel of its own."""
    if device != "cuda":
        return f"torch's {GROUPED_MM} on {device} loops over copies of the weights"
    if dtype != torch.bfloat16:
        return f"torch's {GROUPED_MM} of {name_of(dtype)} is a loop that waits for the GPU"
    if (capability := torch.cuda.get_device_capability()) < CAPABILITY:
        return f"torch's {GROUPED_MM} on compute capability {'.'.join(map(str, capability))} is a loop"
    return ""
