"""Product `grouped-mm`: torch's grouped product, the dense form of MegaBlocks' block-sparse one (arXiv:2211.15841).

The weights of experts are parameters of their own, which optimizers and checkpoints know one by one, and lie apart in
memory; they are copied side by side for each call.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megatron_cp.experts.product import Groups

ROW_BYTES = 16
"""Rows of both operands begin at multiples of so many bytes."""


def torch_function() -> Callable[..., Any] | None:
    """Return torch's grouped product: public from torch 2.10 on, private before; None where there is none."""
    return getattr(functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def misaligned(widths: Sequence[int], dtype: torch.dtype) -> str:
    """Say which widths of the linears make rows that are no multiple of 16 bytes; empty where all are."""
    multiple = ROW_BYTES // dtype.itemsize
    odd = [str(width) for width in widths if width % multiple]
    if not odd:
        return ""
    return f"needs widths that are multiples of {multiple} in {name_of(dtype)}, got {' and '.join(odd)}"


@lru_cache(16)
def lacking(device: str, dtype: torch.dtype) -> str:
    """Say why torch's grouped product cannot run on a device of this type in this dtype; empty where it can.

    Only a call tells: each version of torch takes other devices and dtypes. It is one of two experts with 8 rows each.
    """
    function = torch_function()
    if function is None:
        return f"is not in torch {torch.__version__}"
    rows = torch.zeros(16, 16, device=device, dtype=dtype)
    ends = torch.tensor([8, 16], device=device, dtype=torch.int32)
    try:
        function(rows, rows.new_zeros(2, 16, 16).transpose(-2, -1), offs=ends)
        function(rows.t(), rows, offs=ends)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        return f"of torch {torch.__version__} does not take {name_of(dtype)} on {device} ({reason})"
    return ""


def name_of(dtype: torch.dtype) -> str:
    """Return a dtype's name without its package."""
    return str(dtype).removeprefix("torch.")


class GroupedMatmul:
    """Three grouped products for a linear: forward, input gradient, weight gradients."""

    name = "grouped-mm"

    def __init__(self) -> None:
        function = torch_function()
        assert function is not None, "the choice has asked for it"
        self._function = function
        self.calls = 0

    def forward(self, x: Tensor, weights: Sequence[Tensor], groups: Groups) -> Tensor:
        self.calls += 1
        if not len(x):
            return x.new_empty(0, weights[0].shape[0])
        # E n k -> E k n
        return self._grouped(x, torch.stack(tuple(weights)).transpose(-2, -1), groups)

    def input_gradient(self, dy: Tensor, weights: Sequence[Tensor], groups: Groups) -> Tensor:
        if not len(dy):
            return dy.new_empty(0, weights[0].shape[1])
        return self._grouped(dy, torch.stack(tuple(weights)), groups)

    def weight_gradients(self, dy: Tensor, x: Tensor, groups: Groups) -> Sequence[Tensor]:
        if not len(x):
            return dy.new_zeros(len(groups.sizes), dy.shape[1], x.shape[1]).unbind()
        # T n, T k -> E n k
        return self._grouped(dy.t(), x, groups).unbind()

    def _grouped(self, a: Tensor, b: Tensor, groups: Groups) -> Tensor:
        product: Tensor = self._function(a, b, offs=groups.ends)
        return product
