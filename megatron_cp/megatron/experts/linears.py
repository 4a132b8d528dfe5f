"""Linears of one expert, whose products are computed for all experts of the rank at once.

Constructor, parameters, initial values, marks and checkpoints are Megatron's. Calling one returns its parameters: hooks
on the module run then, such as the wait of --overlap-param-gather for the weights that it uses.
"""

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor


class ExpertColumnLinear(ColumnParallelLinear):
    """First linear of an expert: weight [n/p, k] over the p ranks of its tensor parallelism."""

    def forward(self) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """Return weight and bias."""
        return self.weight, self.bias


class ExpertRowLinear(RowParallelLinear):
    """Second linear of an expert: weight [n, k/p]."""

    def forward(self) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """Return weight and bias."""
        return self.weight, self.bias
