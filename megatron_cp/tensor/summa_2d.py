"""Two-dimensional tensor parallelism (Optimus, arXiv:2104.05343) in its gather form, on any grid of tokens and weights.

Rank r = j w + i of p = t w keeps Megatron's shard r of each weight. Tokens are gathered over the t ranks j' w + i and
weights over the w neighbours j w + i', so that a rank multiplies T/w tokens by n/t features. SUMMA (section 3.1 there)
multiplies the same blocks panel by panel with broadcasts; a gather sends as many bytes and keeps w shards of a weight
at a time, engine `panels` two. Parameters, and with them initial values, gradient norms, optimizers and checkpoints,
are those of Megatron's layout; w = 1 is that layout, t = 1 gathers weights alone.

Attention needs all tokens of a head: `heads_for_tokens` exchanges features of T/w tokens for all T tokens of a share
of the features, which is Megatron's layout of queries, keys and values.
"""

from typing import NamedTuple

from torch import Tensor

from megatron_cp.comm import Fabric
from megatron_cp.tensor.engine import Engine
from megatron_cp.tensor.exchange import features_to_tokens, tokens_to_features
from megatron_cp.tensor.flux import ColumnFlux, RowFlux
from megatron_cp.tensor.linear import Linear
from megatron_cp.tensor.panels import ColumnPanels, PanelEngine, RowPanels
from megatron_cp.tensor.weights import WeightCut, gather_weight, scatter_gradient


class GridLinear(NamedTuple):
    """A linear of one dimension over the token axis, whose weight is gathered over the weight axis for each use.

    A column-parallel one takes x [T/p, k] to y [T/w, n/t], a row-parallel one x [T/w, k/t] to y [T/p, n].
    """

    over_tokens: ColumnFlux | RowFlux
    weights: Engine
    cut: WeightCut

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.over_tokens.forward(x, self._whole(weight))

    def input_gradient(self, dy: Tensor, weight: Tensor) -> Tensor:
        return self.over_tokens.input_gradient(dy, self._whole(weight))

    def weight_gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        return scatter_gradient(self.over_tokens.weight_gradient(dy, x), self.cut, self.weights)

    def backward(self, dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        dx, gradient = self.over_tokens.backward(dy, x, self._whole(weight))
        return dx, scatter_gradient(gradient, self.cut, self.weights)

    def _whole(self, weight: Tensor) -> Tensor:
        return gather_weight(weight, self.cut, self.weights)


def column_linear(tokens: Engine, weights: Engine, blocks: int = 1) -> Linear:
    """Return a column-parallel linear on a grid; a gated one has `blocks` 2."""
    if isinstance(weights, PanelEngine):
        return ColumnPanels(tokens, weights, blocks)
    return GridLinear(ColumnFlux(tokens), weights, WeightCut(0, blocks))


def row_linear(tokens: Engine, weights: Engine) -> Linear:
    """Return a row-parallel linear on a grid."""
    if isinstance(weights, PanelEngine):
        return RowPanels(tokens, weights)
    return GridLinear(RowFlux(tokens), weights, WeightCut(1))


def heads_for_tokens(x: Tensor, tokens: int, weights: Fabric) -> Tensor:
    """Exchange [T/w, n/t] for [T, n/p] over the weight axis, in order of the sequence; `tokens` is t."""
    # w (t s) f, from rank i' the tokens of ranks j' w + i'
    arrived = tokens_to_features(x, weights)
    # w (t s) f -> (t w s) f
    return arrived.unflatten(1, (tokens, -1)).transpose(0, 1).flatten(0, 2)


def tokens_for_heads(x: Tensor, tokens: int, weights: Fabric) -> Tensor:
    """Exchange [T, n/p] for [T/w, n/t], the inverse of `heads_for_tokens`."""
    # (t w s) f -> w (t s) f
    leaving = x.unflatten(0, (tokens, weights.size, -1)).transpose(0, 1).flatten(1, 2)
    return features_to_tokens(leaving, weights)
