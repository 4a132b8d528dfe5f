"""Partial results of rows: how many wait for each other, and the one kernel that adds several."""

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_cp.context.merging import ASSUMED, BY_TORCH, SEVERAL, Merging, StandIn

MOST_PARTS = 8
"""Parts of one launch."""


def accumulator_dtype(tensor: Tensor) -> torch.dtype:
    """Return float64 for float64, float32 for everything else."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def merging_for(like: Tensor) -> Merging:
    """Return how partial results of a tensor like this one are added up; float64 has no kernel."""
    if accumulator_dtype(like) != torch.float32:
        return BY_TORCH
    return ASSUMED.get() or (SEVERAL if like.is_cuda and _has_triton() else BY_TORCH)


@lru_cache(1)
def _has_triton() -> bool:
    return find_spec("triton") is not None


class Partial(NamedTuple):
    """A partial result of some rows: out and lse of attention, or a single addend."""

    rows: slice
    tensors: tuple[Tensor, ...]

    @property
    def bytes(self) -> int:
        """Memory in use while it waits, but for lse: a view keeps all that it is a view of."""
        return self.tensors[0].untyped_storage().nbytes()


def hull(parts: Sequence[Partial]) -> slice:
    """Return the rows from the first to the last one of any part."""
    return slice(min(part.rows.start for part in parts), max(part.rows.stop for part in parts))


def fuse(
    parts: Sequence[Partial], result: tuple[Tensor, ...], first: int = 0, *, stand_in: StandIn | None = None
) -> None:
    """Write the sum of at most MOST_PARTS parts to `result`, whose first row is row `first`, in one kernel.

    Rows without a part get 0 and lse -inf. The result may be one of the parts.
    """
    if not result[0].numel():
        return
    if stand_in is not None:
        stand_in()
        return
    if result[0].device.type == "meta":
        note_kernel([x for part in parts for x in part.tensors], list(result))
        return
    from megatron_cp.kernels import fused_merge

    launch = fused_merge.add if len(result) == 1 else fused_merge.merge
    launch([fused_merge.Part(part.rows.start - first, *map(_with_columns, part.tensors)) for part in parts], *result)


def _with_columns(x: Tensor) -> Tensor:
    """Return x with a contiguous last dim, if it is one of columns."""
    return x if x.ndim < 4 or x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("megatron_cp::note_kernel", mutates_args=("written",))
def note_kernel(read: list[Tensor], written: list[Tensor]) -> None:
    """Stand for a kernel in a recording: a custom operation, so that it counts as one with these tensors."""
    raise AssertionError("a recording has no data")


@note_kernel.register_fake
def _(read: list[Tensor], written: list[Tensor]) -> None:
    return None
