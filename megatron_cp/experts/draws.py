"""Uniform draws by name: the same for the same numbers, wherever and whenever they are made."""

from typing import Any

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def uniform(*names: Tensor | int) -> Tensor:
    """Return a draw in [0, 1) for each row of names, in float32.

    names: integers of at least 0, of which the last 32 bits count, or int64 tensors of them that broadcast against each
        other; at least one is a tensor
    """
    state: Any = 0x9E3779B9
    for name in names:
        # one more than the name, or a row of zeros would leave the state alone
        state = _mixed((state ^ ((name + 1) & _LOW)) & _LOW)
    assert isinstance(state, Tensor), "a draw of numbers alone has no device"
    # as many bits as float32 has
    return (state >> 8).to(torch.float32) * 2.0**-24


def _mixed(x: Any) -> Any:
    """Return 32 bits, each of which depends on all bits of x: the finalizer of MurmurHash3, of the public domain."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _LOW
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _LOW
    return x ^ (x >> 16)
