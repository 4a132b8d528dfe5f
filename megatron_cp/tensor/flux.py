"""FLUX (arXiv:2406.06858): the two linears of one-dimensional tensor parallelism, their communication behind products.

The layout is Megatron's (arXiv:1909.08053) with sequence parallelism (arXiv:2205.05198): between the two linears of a
block each rank has all tokens of the group and a share of the features; outside it has a share of the tokens. How much
is hidden is a matter of the engine: with `collective` these are Megatron's own linears.
"""

from typing import NamedTuple

from torch import Tensor

from megatron_cp.tensor.engine import Engine


class ColumnFlux(NamedTuple):
    """Column-parallel linear: x [T/p, k] and W [n/p, k] -> y [T, n/p]."""

    tokens: Engine

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.tokens.ag_matmul(x, weight.t())

    def input_gradient(self, dy: Tensor, weight: Tensor) -> Tensor:
        return self.tokens.matmul_rs(dy, weight)

    def weight_gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        return self.tokens.wgrad(dy, x)

    def backward(self, dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return self.input_gradient(dy, weight), self.weight_gradient(dy, x)


class RowFlux(NamedTuple):
    """Row-parallel linear: x [T, k/p] and W [n, k/p] -> y [T/p, n]."""

    tokens: Engine

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.tokens.matmul_rs(x, weight.t())

    def input_gradient(self, dy: Tensor, weight: Tensor) -> Tensor:
        return self.tokens.ag_matmul(dy, weight)

    def weight_gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        return self.tokens.wgrad(dy, x)

    def backward(self, dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        # one gather of dy serves both
        return self.tokens.ag_matmul_and_wgrad(dy, weight, x)
