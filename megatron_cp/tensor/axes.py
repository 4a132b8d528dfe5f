"""The engines of a grid of ranks, one for each axis."""

from typing import NamedTuple

from megatron_cp.comm import Fabric, SingleFabric
from megatron_cp.tensor import ENGINES, GEMMS, TORCH
from megatron_cp.tensor.engine import Engine
from megatron_cp.tensor.place import GridSize


class GridEngines(NamedTuple):
    """Engines over the ranks that gather tokens and over those that gather weights."""

    tokens: Engine
    weights: Engine


def engines_over(whole: Fabric, size: GridSize, engine: str, gemm: str = TORCH) -> GridEngines:
    """Return the engines over a fabric's ranks on a grid; all of them call it together.

    An axis of all ranks uses the fabric itself, and an axis of one rank none.
    """
    made, alone = ENGINES.get(engine).load(), ENGINES.get("collective").load()
    axes = [_axis(whole, size, name) for name in ("tokens", "weights")]
    product = GEMMS.get(gemm).load()
    return GridEngines(*(made(axis, product) if axis.size > 1 else alone(axis, product) for axis in axes))


def _axis(whole: Fabric, size: GridSize, name: str) -> Fabric:
    ranks = size.grid.members(name, whole.rank)
    if len(ranks) == 1:
        return SingleFabric()
    return whole if len(ranks) == whole.size else whole.subset(ranks)
