"""Engine `panels`: a grid's weights are multiplied shard by shard as they go around, and never gathered.

SUMMA multiplies panels that it broadcasts (van de Geijn and Watts 1997; Optimus, arXiv:2104.05343, 3.1). Here a panel
is the shard of one rank: it is passed on to the next neighbour while it is multiplied, and each part of a weight's
gradient goes straight to the rank that adds it. Two shards are in memory at a time instead of all w, and their
messages are behind products; tokens are gathered whole, before the products.
"""

from typing import NamedTuple

from torch import Tensor

from megatron_cp.tensor.engine import Engine, add
from megatron_cp.tensor.ring import RingEngine


class PanelEngine(RingEngine):
    """Messages of a ring; on the weight axis of a grid each shard is multiplied as it arrives."""

    name = "panels"


class ColumnPanels(NamedTuple):
    """Column-parallel linear: x [T/p, k] and W [n/p, k] -> y [T/w, n/t], a panel is n/p features.

    blocks: 2 for a gated linear, whose panel has gate and values one below the other
    """

    tokens: Engine
    weights: RingEngine
    blocks: int = 1

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        seen = self.tokens.gather(x)
        y = seen.new_empty(len(seen), self.weights.fabric.size * len(weight))
        for rows, panel in self.weights.arrivals(weight):
            # T (blocks f) -> T blocks f
            self._features(y)[:, :, rows.start // len(weight)] = self.tokens.product(seen, panel.t()).unflatten(
                1, (self.blocks, -1)
            )
        return y

    def input_gradient(self, dy: Tensor, weight: Tensor) -> Tensor:
        total: Tensor | None = None
        for rows, panel in self.weights.arrivals(weight):
            total = add(total, self.tokens.product(self._panel(dy, rows.start // len(weight)), panel))
        assert total is not None
        return self.tokens.reduce_scatter(total.to(dy.dtype).unflatten(0, (self.tokens.fabric.size, -1)))

    def weight_gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        seen = self.tokens.gather(x)
        return self.weights.add_at_owners(lambda owner: self.tokens.product(self._panel(dy, owner).t(), seen))

    def backward(self, dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return self.input_gradient(dy, weight), self.weight_gradient(dy, x)

    def _features(self, y: Tensor) -> Tensor:
        # T (blocks w f) -> T blocks w f
        return y.unflatten(1, (self.blocks, self.weights.fabric.size, -1))

    def _panel(self, y: Tensor, owner: int) -> Tensor:
        # T blocks f -> T (blocks f)
        return self._features(y)[:, :, owner].flatten(1)


class RowPanels(NamedTuple):
    """Row-parallel linear: x [T/w, k/t] and W [n, k/p] -> y [T/p, n], a panel is k/p features of x."""

    tokens: Engine
    weights: RingEngine

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        total: Tensor | None = None
        for rows, panel in self.weights.arrivals(weight):
            total = add(total, self.tokens.product(self._panel(x, rows.start // len(weight)), panel.t()))
        assert total is not None
        return self.tokens.reduce_scatter(total.to(x.dtype).unflatten(0, (self.tokens.fabric.size, -1)))

    def input_gradient(self, dy: Tensor, weight: Tensor) -> Tensor:
        return self._input_gradient(self.tokens.gather(dy), weight)

    def weight_gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        return self._weight_gradient(self.tokens.gather(dy), x)

    def backward(self, dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.tokens.gather(dy)
        return self._input_gradient(seen, weight), self._weight_gradient(seen, x)

    def _input_gradient(self, seen: Tensor, weight: Tensor) -> Tensor:
        size = self.weights.fabric.size
        dx = seen.new_empty(len(seen), size * weight.shape[1])
        for rows, panel in self.weights.arrivals(weight):
            self._panel(dx, rows.start // len(weight)).copy_(self.tokens.product(seen, panel))
        return dx

    def _weight_gradient(self, seen: Tensor, x: Tensor) -> Tensor:
        return self.weights.add_at_owners(lambda owner: self.tokens.product(seen.t(), self._panel(x, owner)))

    def _panel(self, x: Tensor, owner: int) -> Tensor:
        # T (w f) -> T w f
        return x.unflatten(1, (self.weights.fabric.size, -1))[:, owner]
