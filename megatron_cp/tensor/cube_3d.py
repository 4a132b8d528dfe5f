"""Three-dimensional tensor parallelism (arXiv:2105.14450): inputs, weights and outputs each cut over all p = l^3 ranks.

Rank (i, j, k) holds of the first linear of an MLP the tokens of i, the outputs of j and the inputs of k: inputs are
gathered over j, the weight over i, and outputs are added over k (Agarwal et al. 1995). The second linear has j and k
exchanged, so that what lies between the two needs no communication. `features_over` and `tokens_over` lead from
Megatron's layout outside, [T/p, h], to the first linear's input [l T/p, h/l] and back from the second one's output.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_cp.comm import Fabric
from megatron_cp.errors import Refused
from megatron_cp.grid import Grid
from megatron_cp.tensor import ENGINES, GEMMS, TORCH
from megatron_cp.tensor.engine import Engine
from megatron_cp.tensor.exchange import features_to_tokens, tokens_to_features
from megatron_cp.tensor.place import cube_side
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


class CubeCut(NamedTuple):
    """This rank's part of a weight: part `row` of `rows` of each block of its outputs, `column` of `columns` inputs."""

    row: int
    rows: int
    column: int
    columns: int
    blocks: int

    def shape(self, outputs: int, inputs: int) -> tuple[int, int]:
        """Return the part's shape; raises ValueError for a weight that does not divide."""
        if outputs % (self.blocks * self.rows) or inputs % self.columns:
            raise Refused(
                f"--tp-comm-type 3d cuts a weight into {self.blocks} x {self.rows} parts of its outputs and "
                f"{self.columns} of its inputs, got {outputs} and {inputs}; change --ffn-hidden-size or --hidden-size"
            )
        return outputs // self.rows, inputs // self.columns

    def part_of(self, whole: Tensor) -> Tensor:
        """Return the part of a whole weight [n, k]."""
        rows = torch.cat([block.chunk(self.rows)[self.row] for block in whole.chunk(self.blocks)])
        return rows.chunk(self.columns, 1)[self.column]


class CubeEngines(NamedTuple):
    """Engines along the axes of a cube: tokens lie along i, and along j and k inside it."""

    i: Engine
    j: Engine
    k: Engine

    def linear(self, *, first: bool, blocks: int) -> CubeLinear:
        """Return the first or the second linear of an MLP."""
        inputs, outputs = (self.j, self.k) if first else (self.k, self.j)
        return CubeLinear(inputs=inputs, weights=self.i, outputs=outputs, blocks=blocks)

    def cut(self, *, first: bool, blocks: int) -> CubeCut:
        """Return which part of its weight this rank has."""
        side = self.i.fabric.size
        outputs, inputs = (self.j, self.k) if first else (self.k, self.j)
        row = outputs.fabric.rank * side + self.i.fabric.rank
        return CubeCut(row, side**2, inputs.fabric.rank, side, blocks)

    def describe(self) -> str:
        """Return what runs: scheme, sizes and engine."""
        side = self.i.fabric.size
        return f"MLPs 3d, {side} x {side} x {side}, attention 1d, engine {self.i.name}, TP={side**3}"


def cube_engines(fabric: Fabric, engine: str, gemm: str = TORCH) -> CubeEngines:
    """Return the engines along the three axes of a fabric's ranks; all of them call it together."""
    side = cube_side(fabric.size)
    grid, made = Grid(side, side, side, names=("k", "j", "i")), ENGINES.get(engine).load()
    product = GEMMS.get(gemm).load()
    return CubeEngines(*(made(fabric.subset(grid.members(axis, fabric.rank)), product) for axis in "ijk"))


def features_over(x: Tensor, axis: Fabric) -> Tensor:
    """Exchange [s, n] for [l s, n/l] over an axis."""
    return tokens_to_features(x, axis).flatten(0, 1)


def tokens_over(x: Tensor, axis: Fabric) -> Tensor:
    """Exchange [l s, n/l] for [s, n] over an axis, the inverse of `features_over`."""
    return features_to_tokens(x.unflatten(0, (axis.size, -1)), axis)
