"""Three-dimensional tensor parallelism (arXiv:2105.14450): inputs, weights and outputs each cut over all p = l^3 ranks.

Rank (i, j, k) holds of the first linear of an MLP the tokens of i, the outputs of j and the inputs of k: inputs are
gathered over j, the weight over i, and outputs are added over k (Agarwal et al. 1995). The second linear has j and k
exchanged, so that what lies between the two needs no communication. `features_over` and `tokens_over` lead from
Megatron's layout outside, [T/p, h], to the first linear's input [l T/p, h/l] and back from the second one's output.
"""

from typing import NamedTuple

from torch import Tensor

from megatron_cp.comm import Fabric
from megatron_cp.tensor.engine import Engine
from megatron_cp.tensor.exchange import features_to_tokens, tokens_to_features
from megatron_cp.tensor.weights import WeightCut, gather_weight, scatter_gradient


class CubeLinear(NamedTuple):
    """x [T/l^2, k/l] and W [n/l^2, k/l] -> y [T/l^2, n/l].

    inputs, weights, outputs: the axes over which x and W are gathered and y is added
    blocks: 2 for a gated linear
    """

    inputs: Engine
    weights: Engine
    outputs: Engine
    blocks: int = 1

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        partial = self.inputs.ag_matmul(x, self._whole(weight).t())
        return self.outputs.reduce_scatter(partial.unflatten(0, (self.outputs.fabric.size, -1)))

    def input_gradient(self, dy: Tensor, weight: Tensor) -> Tensor:
        return self.inputs.matmul_rs(self.outputs.gather(dy), self._whole(weight))

    def weight_gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        return self._shard_gradient(self.outputs.gather(dy), x)

    def backward(self, dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        gathered = self.outputs.gather(dy)
        return self.inputs.matmul_rs(gathered, self._whole(weight)), self._shard_gradient(gathered, x)

    def _whole(self, weight: Tensor) -> Tensor:
        return gather_weight(weight, WeightCut(0, self.blocks), self.weights)

    def _shard_gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        return scatter_gradient(self.inputs.wgrad(dy, x), WeightCut(0, self.blocks), self.weights)


def features_over(x: Tensor, axis: Fabric) -> Tensor:
    """Exchange [s, n] for [l s, n/l] over an axis."""
    return tokens_to_features(x, axis).flatten(0, 1)


def tokens_over(x: Tensor, axis: Fabric) -> Tensor:
    """Exchange [l s, n/l] for [s, n] over an axis, the inverse of `features_over`."""
    return features_to_tokens(x.unflatten(0, (axis.size, -1)), axis)
