"""The activation of Megatron's MLP alone."""

from typing import Any

from megatron.core.transformer.mlp import MLP
from torch import Tensor, nn


class _Unchanged(nn.Module):
    """A linear that returns its input and no bias."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x, None


class Activation:
    """Megatron's MLP without its linears: gate, clamps, offset, fused kernels and probabilities are its own."""

    def __init__(self, config: Any, activation_func: Any) -> None:
        self.config, self.activation_func = config, activation_func
        self.linear_fc1 = self.linear_fc2 = _Unchanged()

    def __call__(self, x: Tensor, probs: Tensor) -> Tensor:
        """Return the activation [T, f] of x [T, f] or, with a gate, [T, 2 f], each row times its probability."""
        mlp: Any = self
        result: Tensor = MLP.forward(mlp, x, probs)[0]
        return result
