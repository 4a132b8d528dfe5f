"""Column- and row-parallel linears of Megatron whose products run over a grid of the tensor-parallel ranks.

A linear keeps Megatron's constructor, and with it its parameter, initial values, marks and checkpoint: rank r holds
shard r of a weight, as always. The linears of experts, and those with another name than attention's and the MLP's,
stay Megatron's own.
"""

from functools import partial
from typing import Any, NamedTuple

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megatron_cp.errors import Refused
from megatron_cp.megatron.pipeline.split_linear import bound_queue
from megatron_cp.megatron.run import TensorFlags
from megatron_cp.megatron.tensor.function import Exchange, apply_linear
from megatron_cp.megatron.tensor.groups import engines_of
from megatron_cp.tensor import GEMMS, SCHEMES, TORCH
from megatron_cp.tensor.axes import GridEngines
from megatron_cp.tensor.linear import Linear
from megatron_cp.tensor.place import GridSize, engine_of, grid_of
from megatron_cp.tensor.summa_2d import column_linear, heads_for_tokens, row_linear, tokens_for_heads

COLUMNS, ROWS = ("qkv", "fc1"), ("proj", "fc2")
ATTENTION = ("qkv", "proj")


class PlacedLinear(NamedTuple):
    """How one linear is computed over the ranks of its group.

    exchanges: heads are exchanged for tokens beside it, for attention
    """

    linear: Linear
    engines: GridEngines
    size: GridSize
    scheme: str
    gemm: str
    exchanges: bool

    def exchange(self, x: Tensor, *, to_heads: bool) -> Tensor:
        """Exchange x [s, b, features] between the grid's layout and attention's, where they differ."""
        if not self.exchanges:
            return x
        tokens, weights = self.size.tokens, self.engines.weights.fabric
        ways = [partial(way, tokens=tokens, weights=weights) for way in (heads_for_tokens, tokens_for_heads)]
        result: Tensor = Exchange.apply(x, *(ways if to_heads else ways[::-1]))
        return result

    def describe(self) -> str:
        """Return what runs: scheme, grid, engine and size."""
        name = self.engines.tokens.name if self.size.tokens > 1 else self.engines.weights.name
        grid = f", tokens x weights = {self.size}" if SCHEMES.get(self.scheme).grid else ""
        products = f", products {self.gemm}" if self.gemm != TORCH else ""
        return f"{self.scheme}{grid}, engine {name}{products}, TP={self.size.grid.ranks}"


def _placed(module: Any, name: str | None, *, column: bool) -> PlacedLinear | None:
    """Place a linear of this name on its group's grid; None for one that stays Megatron's."""
    flags = TensorFlags.of(module.config)
    if name not in (COLUMNS if column else ROWS) or module.is_expert or module.tp_group.size() == 1:
        return None
    if not module.config.sequence_parallel:
        raise Refused(f"--tp-comm-type {flags.comm_type} gathers tokens of sequence parallelism; set sequence_parallel")
    size = grid_of(SCHEMES.get(flags.comm_type), module.tp_group.size(), flags.grid)
    engines = engines_of(module.tp_group, size, engine_of(flags.engine), GEMMS.get(flags.gemm).name)
    if column:
        linear = column_linear(*engines, 2 if name == "fc1" and module.config.gated_linear_unit else 1)
    else:
        linear = row_linear(*engines)
    exchanges = name in ATTENTION and size.weights > 1
    return PlacedLinear(linear, engines, size, flags.comm_type, flags.gemm, exchanges)


class GridColumnLinear(ColumnParallelLinear):
    """Megatron's column-parallel linear over a grid: [T/p, b, k] to [T/w, b, n/t], and to [T, b, n/p] for attention."""

    def __init__(self, *args: Any, tp_comm_buffer_name: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, tp_comm_buffer_name=tp_comm_buffer_name, **kwargs)
        self.placed = _placed(self, tp_comm_buffer_name, column=True)

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if self.placed is None:
            return super().forward(input_, weight, runtime_gather_output)
        assert weight is None, "attention and MLPs use the linear's own weight"
        output = apply_linear(self.placed.linear, input_, self.weight, bound_queue())
        output = self.placed.exchange(output, to_heads=True)
        if self.skip_bias_add:
            return output, self.bias
        return (output if self.bias is None else output + self.bias), None


class GridRowLinear(RowParallelLinear):
    """Megatron's row-parallel linear over a grid: [T/w, b, k/t], or attention's [T, b, k/p], to [T/p, b, n]."""

    def __init__(self, *args: Any, tp_comm_buffer_name: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, tp_comm_buffer_name=tp_comm_buffer_name, **kwargs)
        self.placed = _placed(self, tp_comm_buffer_name, column=False)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.placed is None:
            return super().forward(input_)
        given = self.placed.exchange(input_, to_heads=False)
        output = apply_linear(self.placed.linear, given, self.weight, bound_queue())
        if self.skip_bias_add:
            return output, self.bias
        return (output if self.bias is None else output + self.bias), None
