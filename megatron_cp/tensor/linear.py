"""Form of a tensor-parallel linear: forward, and a backward whose two halves can run apart."""

from typing import Protocol

from torch import Tensor


class Linear(Protocol):
    """y = x W^T over the ranks of a tensor-parallel group, with two-dimensional tensors, tokens first.

    All ranks call each method together. W is this rank's shard, as in Megatron's one-dimensional layout.
    """

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return y."""
        ...

    def input_gradient(self, dy: Tensor, weight: Tensor) -> Tensor:
        """Return dx."""
        ...

    def weight_gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        """Return the gradient of this rank's shard, from tensors as forward and backward had them."""
        ...

    def backward(self, dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return both gradients, with no more communication than they need together."""
        ...
