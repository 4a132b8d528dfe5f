"""Engine `symmetric`: torch's fused products over symmetric memory, for GPUs that reach each other's memory.

`symm_mem::fused_all_gather_matmul` and `symm_mem::fused_matmul_reduce_scatter` copy peers' pieces on a second stream
while products run (async tensor parallelism of PyTorch). They are private operations of torch and are looked up when
the engine is made. One gather serves both gradients of a row-parallel linear: the first operation returns it.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, get_process_group_ranks

from megatron_cp import config
from megatron_cp.comm import Fabric, GroupFabric
from megatron_cp.comm.fabric import size_in_bytes
from megatron_cp.errors import CannotRun, Refused
from megatron_cp.tensor.collective import CollectiveEngine
from megatron_cp.tensor.gemm import Multiply, torch_product

NAMES = ("fused_all_gather_matmul", "fused_matmul_reduce_scatter")


class FusedOperations(NamedTuple):
    """The two operations, called as `gather_matmul(local, [matrix], dim, group, return_A=)` and
    `matmul_scatter(whole, matrix, "sum", dim, group)`.
    """

    gather_matmul: Callable[..., Any]
    matmul_scatter: Callable[..., Any]


def fused_operations() -> FusedOperations:
    """Return torch's operations; raise CannotRun where this torch has none."""
    # registers the operations where torch has them
    importlib.import_module("torch.distributed._symmetric_memory")
    missing = [name for name in NAMES if not hasattr(torch.ops.symm_mem, name)]
    if missing:
        raise CannotRun(
            f"engine symmetric needs torch.ops.symm_mem.{missing[0]}, which torch {torch.__version__} does not have; "
            f"use another torch, or engine ring"
        )
    return FusedOperations(*(getattr(torch.ops.symm_mem, name) for name in NAMES))


def refuse_far_ranks(group: ProcessGroup) -> None:
    """Refuse a group some of whose ranks cannot reach each other's memory: on several nodes, or without peer access."""
    per_node = int(config.variable("LOCAL_WORLD_SIZE", "0")) or torch.cuda.device_count()
    ranks = get_process_group_ranks(group)
    nodes = {rank // per_node for rank in ranks} if per_node else set()
    if len(nodes) != 1:
        raise Refused(
            f"engine symmetric runs between GPUs of one node, got the ranks {ranks} on {len(nodes)} nodes of "
            f"{per_node} GPUs; use engine ring"
        )
    mine = torch.cuda.current_device()
    for rank in ranks:
        other = rank % per_node
        if other != mine and not torch.cuda.can_device_access_peer(mine, other):
            raise Refused(
                f"engine symmetric needs GPUs that reach each other's memory over NVLink, got {mine} and {other}, "
                f"which do not; use engine ring"
            )


class SymmetricEngine(CollectiveEngine):
    """Fused products over one process group; other sums and gathers as in engine `collective`."""

    name = "symmetric"

    def __init__(
        self, fabric: Fabric, product: Multiply = torch_product, operations: FusedOperations | None = None
    ) -> None:
        super().__init__(fabric, product)
        if not isinstance(fabric, GroupFabric):
            raise Refused(f"engine symmetric runs over a process group, got a {type(fabric).__name__}; use engine ring")
        if operations is None:
            refuse_far_ranks(fabric.group)
        self._operations = operations or fused_operations()
        self._group: str = fabric.group.group_name

    def ag_matmul(self, local: Tensor, matrix: Tensor) -> Tensor:
        return self._gathered(local, matrix, keep=False)[1]

    def matmul_rs(self, whole: Tensor, matrix: Tensor) -> Tensor:
        self._count(len(whole) // self.fabric.size * matrix.shape[1] * whole.element_size())
        product: Tensor = self._operations.matmul_scatter(whole.contiguous(), matrix, "sum", 0, self._group)
        return product

    def ag_matmul_and_wgrad(self, dy: Tensor, matrix: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        gathered, product = self._gathered(dy, matrix, keep=True)
        assert gathered is not None
        return product, self.product(gathered.t(), x)

    def _gathered(self, local: Tensor, matrix: Tensor, *, keep: bool) -> tuple[Tensor | None, Tensor]:
        self._count(size_in_bytes(local))
        whole, (product,) = self._operations.gather_matmul(local.contiguous(), [matrix], 0, self._group, return_A=keep)
        return whole, product

    def _count(self, size: int) -> None:
        self.fabric.sent += (self.fabric.size - 1) * size
