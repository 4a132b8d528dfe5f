"""Blocks of numbers as messages of few bits: whole numbers of a block's scale, and the scale (arXiv:2306.10209, 3.1).

A message is a row of bytes: the codes of a block, 1 byte each or 2 to a byte, and its scale in float32. One block has
one message, so that messages are cut and sent as rows. What is no number stays none: the scale tells.
"""

from importlib.util import find_spec
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_cp.replicas import SCALE, Quantisation

LEFT = torch.bfloat16
"""Dtype of what codes leave over for the next step, 2 bytes an element."""


class Coding(Protocol):
    """How blocks of numbers travel."""

    @property
    def block(self) -> int:
        """Return the elements of a row."""
        ...

    @property
    def width(self) -> int:
        """Return the bytes of a row's message."""
        ...

    def encode(self, values: Tensor, left: Tensor | None) -> Tensor:
        """Return a message for each row of values [rows block]; see `quantised`."""
        ...

    def add(self, messages: Tensor) -> Tensor:
        """Return the sum [rows block] of what messages [peers rows …] stand for, in float32."""
        ...


class Coded(NamedTuple):
    """Blocks travel as codes and scales."""

    quantisation: Quantisation

    @property
    def block(self) -> int:
        return self.quantisation.block

    @property
    def width(self) -> int:
        return width(self.quantisation.bits, self.block)

    def encode(self, values: Tensor, left: Tensor | None) -> Tensor:
        return quantised(values, self.quantisation.bits, left)

    def add(self, messages: Tensor) -> Tensor:
        return added(messages, self.quantisation.bits)


class Plain(NamedTuple):
    """Numbers travel as they are, each a row; sums are float32 and travel on in their dtype."""

    dtype: torch.dtype

    @property
    def block(self) -> int:
        return 1

    @property
    def width(self) -> int:
        return self.dtype.itemsize

    def encode(self, values: Tensor, left: Tensor | None) -> Tensor:
        return values.to(self.dtype)

    def add(self, messages: Tensor) -> Tensor:
        return messages.sum(0, dtype=torch.float32)


def width(bits: int, block: int) -> int:
    """Return the bytes of a block's message."""
    return block * bits // 8 + SCALE


def steps(bits: int) -> int:
    """Return the largest code; codes lie on both sides of 0 alike."""
    return int(2 ** (bits - 1)) - 1


@torch.no_grad()
def quantised(values: Tensor, bits: int, left: Tensor | None = None) -> Tensor:
    """Return the messages [rows width] of blocks of values [rows block], 8 or 4 bits a number; blocks are of 8 n.

    A number is off by half a scale at most, which is the largest of its block over 127 or 7. `left` [rows block] is
    what the last call left over: it is added first, and then holds what this one leaves (arXiv:1901.09847).
    """
    assert bits in (4, 8)
    assert values.shape[1] % 8 == 0, values.shape
    messages = values.new_empty((len(values), width(bits, values.shape[1])), dtype=torch.uint8)
    if not len(values):
        return messages
    if _fused(values):
        from megatron_cp.kernels import fused_quantise

        fused_quantise.quantise(values.contiguous(), bits, left, messages)
        return messages
    values = values.float() if left is None else values.float() + left
    most = steps(bits)
    scales = values.abs().amax(1, keepdim=True) / most
    codes = (values / scales.clamp_min(torch.finfo(torch.float32).tiny)).round_().clamp_(-most, most).nan_to_num_(0.0)
    if left is not None:
        rest = values - codes * scales
        left.copy_(torch.where(rest.isfinite(), rest, 0.0))
    if bits == 8:
        messages[:, :-SCALE] = codes.to(torch.int8).view(torch.uint8)
    else:
        # four bits each, from 1 to 15
        low, high = (codes + 8).to(torch.uint8).chunk(2, dim=1)
        messages[:, :-SCALE] = low | high << 4
    messages.view(torch.float32)[:, -1:] = scales
    return messages


@torch.no_grad()
def added(messages: Tensor, bits: int) -> Tensor:
    """Return the sum [rows block] of what messages [peers rows width] stand for, in the order of the peers."""
    peers, rows, size = messages.shape
    total = messages.new_zeros((rows, (size - SCALE) * 8 // bits), dtype=torch.float32)
    if rows and _fused(messages):
        from megatron_cp.kernels import fused_quantise

        fused_quantise.add(messages, bits, total)
        return total
    for peer in range(peers if rows else 0):
        codes, scales = messages[peer, :, :-SCALE], messages[peer].view(torch.float32)[:, -1:]
        if bits == 8:
            found = codes.contiguous().view(torch.int8).float()
        else:
            found = torch.cat([codes & 15, codes >> 4], dim=1).float() - 8
        total += found * scales
    return total


def _fused(tensor: Tensor) -> bool:
    """Return True where our Triton kernels run."""
    return tensor.is_cuda and find_spec("triton") is not None
