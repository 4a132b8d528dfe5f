"""An MLP of Megatron's whose linears are three-dimensional; attention beside it stays one-dimensional.

A weight is cut along both of its axes, so that the MLP has linears and a checkpoint of its own; names, shapes and
initial values of whole weights are Megatron's, and so a checkpoint moves to and from any other tensor parallelism.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.tensor_parallel.layers import _initialize_affine_weight_gpu, set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_object_for_checkpoint,
    sharded_state_dict_default,
)
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_cp.errors import Refused
from megatron_cp.megatron.flags.tensor import TensorFlags
from megatron_cp.megatron.pipeline.split_linear import bound_queue
from megatron_cp.megatron.tensor.function import Exchange, apply_linear
from megatron_cp.megatron.tensor.groups import cube_of
from megatron_cp.tensor import GEMMS
from megatron_cp.tensor.cube_3d import features_over, tokens_over
from megatron_cp.tensor.place import engine_of


class CubeParallelLinear(nn.Module):
    """One linear of the MLP, "fc1" or "fc2": W [outputs/l^2, inputs/l] on each of l^3 ranks."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: Any,
        init_method: Callable[[Tensor], Any],
        bias: bool,
        tp_comm_buffer_name: str,
        tp_group: ProcessGroup,
        is_expert: bool = False,
        **rest: Any,
    ) -> None:
        super().__init__()
        if bias or is_expert or not config.sequence_parallel:
            raise Refused("--tp-comm-type 3d places MLPs without bias under sequence parallelism, and no experts")
        self.config, self.tp_group, self.is_expert = config, tp_group, is_expert
        self.first = tp_comm_buffer_name == "fc1"
        flags = TensorFlags.of(config)
        self.placed = cube_of(tp_group, engine_of(flags.engine), GEMMS.get(flags.gemm).name)
        blocks = 2 if self.first and config.gated_linear_unit else 1
        self.linear = self.placed.linear(first=self.first, blocks=blocks)
        self.cut = self.placed.cut(first=self.first, blocks=blocks)
        rows, columns = self.cut.shape(output_size, input_size)
        on_cpu = config.use_cpu_initialization
        device = None if on_cpu else torch.cuda.current_device()
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=config.params_dtype, device=device))
        self._initialize(init_method, output_size, input_size, blocks)
        self.weight.allreduce = True  # type: ignore[attr-defined]
        # for whoever fills in a part of a whole weight
        self.weight.cube_cut = self.cut  # type: ignore[attr-defined]

    def _initialize(self, init_method: Callable[[Tensor], Any], outputs: int, inputs: int, blocks: int) -> None:
        config = self.config
        if config.perform_initialization and not config.use_cpu_initialization:
            _initialize_affine_weight_gpu(self.weight, init_method, partition_dim=0, stride=blocks)
            return
        set_tensor_model_parallel_attributes(tensor=self.weight, is_parallel=True, dim=0, stride=blocks)
        if config.perform_initialization:
            # as Megatron on a CPU: all ranks draw the whole weight
            whole = torch.empty(outputs, inputs)
            init_method(whole)
            with torch.no_grad():
                self.weight.copy_(self.cut.part_of(whole))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Map [T/p, b, h] to what lies between the two linears, [T/l^2, b, n/l], or that back."""
        fabric = self.placed.k.fabric
        there, back = partial(features_over, axis=fabric), partial(tokens_over, axis=fabric)
        given = Exchange.apply(x, there, back) if self.first else x
        y = apply_linear(self.linear, given, self.weight, bound_queue())
        return (y if self.first else Exchange.apply(y, back, there)), None

    def backward_dw(self) -> None:
        """Do nothing, as Megatron's own linears: a split schedule asks the queue."""

    def get_extra_state(self) -> None:
        """Keep the names that checkpoints of transformer-engine have."""
        return

    def set_extra_state(self, state: Any) -> None:
        """Ignore extra state."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the weight with its place along both axes; a gated one is two tensors, one below the other."""
        assert metadata is not None
        axes, rank = len(sharded_offsets), metadata["dp_cp_group"].rank()
        key, cut, replica = f"{prefix}weight", self.cut, (0, 0, rank)
        singleton = metadata.get("singleton_local_shards", False)

        def shard(name: str, tensor: Tensor, row: int, rows: int, replica_id: Any = replica) -> ShardedTensor:
            return ShardedTensor.from_rank_offsets(
                name,
                tensor,
                *sharded_offsets,
                (axes, row, rows),
                (axes + 1, cut.column, cut.columns),
                replica_id=replica_id,
                prepend_axis_num=axes,
            )

        def halves(name: str, tensor: Tensor, replica_id: Any, flattened_range: Any) -> list[ShardedTensor]:
            gate, values = tensor.chunk(2)
            if singleton:
                return [
                    shard(f"{name}_{which}", half, cut.row, cut.rows, replica_id)
                    for which, half in (("w", gate), ("v", values))
                ]
            places = ((gate, cut.row), (values, cut.rows + cut.row))
            return [shard(name, half, row, 2 * cut.rows, replica_id) for half, row in places]

        state = f"{prefix}_extra_state"
        extra = make_sharded_object_for_checkpoint(None, state, sharded_offsets, (0, self.tp_group.rank(), rank))
        if cut.blocks == 1:
            return {key: shard(key, self.weight, cut.row, cut.rows), state: extra}
        return {key: ShardedTensorFactory(key, self.weight, halves, torch.cat, replica), state: extra}


class CubeMLP(MLP):
    """Megatron's MLP with three-dimensional linears, which describe their own shards in a checkpoint."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return what the linears return; Megatron's would cut a gated weight along one axis."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        found: dict[str, Any] = {}
        for name, module in self._modules.items():
            found |= sharded_state_dict_default(module, f"{prefix}{name}.", sharded_offsets, metadata)
        return found
