"""Engine `collective`: all-gather, then one product; one product, then reduce-scatter, as Megatron's own linears.

Sources: Megatron-LM (arXiv:1909.08053), sequence parallelism (arXiv:2205.05198).
"""

from collections.abc import Iterator

from torch import Tensor

from megatron_cp.tensor.engine import Arrival, Engine


class CollectiveEngine(Engine):
    """Whole products between collectives of the fabric."""

    name = "collective"

    def arrivals(self, local: Tensor) -> Iterator[Arrival]:
        whole = self.gather(local)
        yield Arrival(slice(0, len(whole)), whole)

    def matmul_rs(self, whole: Tensor, matrix: Tensor) -> Tensor:
        return self.reduce_scatter(self.product(whole, matrix).unflatten(0, (self.fabric.size, -1)))

    def reduce_scatter(self, parts: Tensor) -> Tensor:
        return self.fabric.reduce_scatter(parts)
