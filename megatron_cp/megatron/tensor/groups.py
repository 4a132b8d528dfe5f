"""The engines of a tensor-parallel group, made once for all its linears."""

from functools import lru_cache
from typing import Any

from megatron.core import parallel_state
from torch.distributed import ProcessGroup

from megatron_cp.comm import GroupFabric
from megatron_cp.megatron.flags.tensor import TensorFlags
from megatron_cp.tensor import CUBE, GEMMS, SCHEMES
from megatron_cp.tensor.axes import GridEngines, engines_over
from megatron_cp.tensor.cube_3d import CubeEngines, cube_engines
from megatron_cp.tensor.place import GridSize, engine_of, grid_of


def connect_linears(config: Any) -> None:
    """Make the engines of this config's linears; a process whose stage has none of them makes the groups too."""
    flags = TensorFlags.of(config)
    if not flags.ours or not config.sequence_parallel or not parallel_state.model_parallel_is_initialized():
        return
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return
    engine, gemm = engine_of(flags.engine), GEMMS.get(flags.gemm).name
    engines_of(group, grid_of(SCHEMES.get(flags.comm_type), group.size(), flags.grid), engine, gemm)
    if flags.comm_type == CUBE:
        cube_of(group, engine, gemm)


# a model has one tensor-parallel group and one grid
@lru_cache(8)
def engines_of(group: ProcessGroup, size: GridSize, engine: str, gemm: str) -> GridEngines:
    """Return the engines over a group's grid; all processes of the run make them together, when first asked for."""
    return engines_over(GroupFabric(group), size, engine, gemm)


@lru_cache(8)
def cube_of(group: ProcessGroup, engine: str, gemm: str) -> CubeEngines:
    """Return the engines along a group's three axes; all processes of the run make them together, as above."""
    return cube_engines(GroupFabric(group), engine, gemm)
