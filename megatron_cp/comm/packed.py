"""Several tensors as one message."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorForm:
    """Shape and dtype of a tensor, which its receiver knows beforehand."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorForm":
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def packed(tensors: Iterable[Tensor], device: torch.device | int) -> Tensor:
    """Return the bytes of all tensors, one after the other, on a device."""
    return torch.cat([tensor.detach().to(device).contiguous().flatten().view(torch.uint8) for tensor in tensors])


def unpacked(message: Tensor, forms: Sequence[TensorForm]) -> list[Tensor]:
    """Return the tensors of a message in memory of their own, the inverse of `packed`."""
    ends = pairwise(accumulate((form.bytes for form in forms), initial=0))
    return [
        message[start:stop].clone().view(form.dtype).view(form.shape)
        for form, (start, stop) in zip(forms, ends, strict=True)
    ]
