"""The engines of a tensor-parallel group, made once for all its linears."""

from functools import lru_cache

from torch.distributed import ProcessGroup

from megatron_cp.comm import GroupFabric
from megatron_cp.tensor.axes import GridEngines, engines_over
from megatron_cp.tensor.place import GridSize


# a model has one tensor-parallel group and one grid
@lru_cache(8)
def engines_of(group: ProcessGroup, size: GridSize, engine: str, gemm: str) -> GridEngines:
    """Return the engines over a group's grid; the ranks of the group make them together, at their first linear."""
    return engines_over(GroupFabric(group), size, engine, gemm)
