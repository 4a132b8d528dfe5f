"""Matrix products over tokens that are spread over the ranks of a fabric: the seam between linears and transport.

Matrices are two-dimensional, tokens first. A rank's tokens are its `local` rows; the rows of all ranks, in order of
rank, are the `whole`. `ag_matmul` and `matmul_rs` are the two products of tensor parallelism with sequence parallelism
(arXiv:2205.05198, 4.2.2); an engine decides how their communication is done, and what is computed meanwhile.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_cp.comm import Fabric
from megatron_cp.tensor.gemm import Multiply, torch_product


class Arrival(NamedTuple):
    """Some rows of the whole, and where they lie in it."""

    rows: slice
    tensor: Tensor


class Engine(ABC):
    """Products over the ranks of one fabric, of which each has equally many tokens.

    product: computes those of this rank
    """

    name: str

    def __init__(self, fabric: Fabric, product: Multiply = torch_product) -> None:
        self.fabric, self.product = fabric, product

    @abstractmethod
    def arrivals(self, local: Tensor) -> Iterator[Arrival]:
        """Yield all rows of the whole as they arrive; a tensor is valid until the next one is asked for."""

    @abstractmethod
    def matmul_rs(self, whole: Tensor, matrix: Tensor) -> Tensor:
        """Multiply whole [p s, k] by matrix [k, n], add over the ranks and return this rank's rows [s, n]."""

    @abstractmethod
    def reduce_scatter(self, parts: Tensor) -> Tensor:
        """Add parts [p, ...] over the ranks and return this rank's part [...]."""

    def gather(self, local: Tensor) -> Tensor:
        """Return the tensors of all ranks one below the other: local [s, ...] -> [p s, ...]."""
        return self.fabric.all_gather(local).flatten(0, 1)

    def ag_matmul(self, local: Tensor, matrix: Tensor) -> Tensor:
        """Gather local [s, k] and multiply it by matrix [k, n]: [p s, n]."""
        product = local.new_empty(self.fabric.size * len(local), matrix.shape[1])
        for rows, tensor in self.arrivals(local):
            self.product(tensor, matrix, product[rows])
        return product

    def wgrad(self, dy: Tensor, x: Tensor) -> Tensor:
        """Return dy^T x [n, k] over all tokens; of dy [.., n] and x [.., k] one is whole, and the other one local."""
        total: Tensor | None = None
        x_arrives = len(x) <= len(dy)
        for rows, tensor in self.arrivals(x if x_arrives else dy):
            total = add(total, self.product(*((dy[rows].t(), tensor) if x_arrives else (tensor.t(), x[rows]))))
        assert total is not None
        return total.to(dy.dtype)

    def ag_matmul_and_wgrad(self, dy: Tensor, matrix: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Gather local dy [s, n] once, for dy matrix [p s, k] and for dy^T x [n, k] with x [p s, k] whole."""
        product = dy.new_empty(self.fabric.size * len(dy), matrix.shape[1])
        total: Tensor | None = None
        for rows, tensor in self.arrivals(dy):
            self.product(tensor, matrix, product[rows])
            total = add(total, self.product(tensor.t(), x[rows]))
        assert total is not None
        return product, total.to(dy.dtype)


def add(total: Tensor | None, part: Tensor) -> Tensor:
    """Return the sum of both in float32 (float64 for float64); `total` is a sum so far, which is written to."""
    if total is None:
        return part
    return total.to(torch.promote_types(part.dtype, torch.float32)).add_(part)
