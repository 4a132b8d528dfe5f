"""The engines of a tensor-parallel group, one for each axis of its grid, made once for all its linears."""

from functools import lru_cache
from typing import NamedTuple

from torch.distributed import ProcessGroup

from megatron_cp.comm import Fabric, GroupFabric, SingleFabric
from megatron_cp.tensor import ENGINES
from megatron_cp.tensor.engine import Engine
from megatron_cp.tensor.place import GridSize


class GridEngines(NamedTuple):
    """Engines over the ranks that gather tokens and over those that gather weights."""

    tokens: Engine
    weights: Engine


# a model has one tensor-parallel group and one grid
@lru_cache(8)
def engines_of(group: ProcessGroup, size: GridSize, engine: str) -> GridEngines:
    """Return the engines over a group's grid; the ranks of the group make them together, at their first linear.

    An axis of all ranks uses the group itself, and an axis of one rank none.
    """
    whole, made = GroupFabric(group), ENGINES.get(engine).load()
    alone = ENGINES.get("collective").load()
    axes = [_axis(whole, size, name) for name in ("tokens", "weights")]
    return GridEngines(*(made(axis) if axis.size > 1 else alone(axis) for axis in axes))


def _axis(whole: GroupFabric, size: GridSize, name: str) -> Fabric:
    ranks = size.grid.members(name, whole.rank)
    if len(ranks) == 1:
        return SingleFabric()
    return whole if len(ranks) == whole.size else whole.subset(ranks)
