"""Column- and row-parallel linears of Megatron whose products run over a grid of the tensor-parallel ranks.

A linear keeps Megatron's constructor, and with it its parameter, initial values, marks and checkpoint: rank r holds
shard r of a weight, as always. The linears of experts, and those with another name than attention's and the MLP's,
stay Megatron's own. The output layer runs over all ranks in one dimension, its communication behind its products.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn
from torch.distributed import get_world_size

from megatron_cp.errors import Refused
from megatron_cp.megatron.flags.tensor import TensorFlags
from megatron_cp.megatron.pipeline.split_linear import bound_queue
from megatron_cp.megatron.tensor.function import Exchange, apply_linear
from megatron_cp.megatron.tensor.groups import engines_of
from megatron_cp.tensor import GEMMS, SCHEMES, TORCH
from megatron_cp.tensor.axes import GridEngines
from megatron_cp.tensor.flux import ColumnFlux
from megatron_cp.tensor.linear import Linear
from megatron_cp.tensor.place import GridSize, engine_of, grid_of
from megatron_cp.tensor.summa_2d import column_linear, heads_for_tokens, row_linear, tokens_for_heads
from megatron_cp.tensor.tesseract import Depth, depth

COLUMNS, ROWS = ("qkv", "fc1"), ("proj", "fc2")
ATTENTION = ("qkv", "proj")


class PlacedLinear(NamedTuple):
    """How one linear is computed over the ranks of its group.

    exchanges: heads are exchanged for tokens beside it, for attention
    depth:     axis beside the grid over which weights are repeated, of a scheme that has one
    """

    linear: Linear
    engines: GridEngines
    size: GridSize
    scheme: str
    gemm: str
    exchanges: bool
    depth: Depth | None

    def exchange(self, x: Tensor, *, to_heads: bool) -> Tensor:
        """Exchange x [s, b, features] between the grid's layout and attention's, where they differ."""
        if not self.exchanges:
            return x
        tokens, weights = self.size.tokens, self.engines.weights.fabric
        ways = [partial(way, tokens=tokens, weights=weights) for way in (heads_for_tokens, tokens_for_heads)]
        result: Tensor = Exchange.apply(x, *(ways if to_heads else ways[::-1]))
        return result

    def describe(self) -> str:
        """Return what runs: scheme, grid, depth, engine and size."""
        name = self.engines.tokens.name if self.size.tokens > 1 else self.engines.weights.name
        grid = f", tokens x weights = {self.size}" if SCHEMES.get(self.scheme).grid else ""
        grid += f", depth = {self.depth.size} ({self.depth.axis})" if self.depth else ""
        products = f", products {self.gemm}" if self.gemm != TORCH else ""
        return f"{self.scheme}{grid}, engine {name}{products}, TP={self.size.grid.ranks}"


def _placed(module: Any, name: str | None, *, column: bool) -> PlacedLinear | None:
    """Place a linear of this name on its group's grid; None for one that stays Megatron's."""
    flags = TensorFlags.of(module.config)
    if name not in (COLUMNS if column else ROWS) or module.is_expert or module.tp_group.size() == 1:
        return None
    if not module.config.sequence_parallel:
        raise Refused(f"--tp-comm-type {flags.comm_type} gathers tokens of sequence parallelism; set sequence_parallel")
    scheme = SCHEMES.get(flags.comm_type)
    size = grid_of(scheme, module.tp_group.size(), flags.grid)
    engines = engines_of(module.tp_group, size, engine_of(flags.engine), GEMMS.get(flags.gemm).name)
    if column:
        linear = column_linear(*engines, 2 if name == "fc1" and module.config.gated_linear_unit else 1)
    else:
        linear = row_linear(*engines)
    exchanges = name in ATTENTION and size.weights > 1
    beside = _depth(module) if scheme.depth else None
    return PlacedLinear(linear, engines, size, flags.comm_type, flags.gemm, exchanges, beside)


def _depth(module: Any) -> Depth:
    config = module.config
    others = module.tp_group.size() * config.pipeline_model_parallel_size * config.context_parallel_size
    return depth(config.context_parallel_size, get_world_size() // others)


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


class PlacedOutput(NamedTuple):
    """How an output layer is computed over the ranks of its group."""

    linear: ColumnFlux
    engines: GridEngines
    gemm: str

    def describe(self) -> str:
        """Return what runs: engine and size."""
        products = f", products {self.gemm}" if self.gemm != TORCH else ""
        return f"flux, engine {self.linear.tokens.name}{products}, TP={self.linear.tokens.fabric.size}"


class OutputLinear(ColumnParallelLinear):
    """Megatron's output layer, its communication behind its products: [T/p, b, h] to [T, b, V/p]."""

    placed: PlacedOutput

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        gathers = self.gather_output if runtime_gather_output is None else runtime_gather_output
        # inference gathers its last tokens itself
        if gathers or not self.sequence_parallel:
            return super().forward(input_, weight, runtime_gather_output)
        own = self.weight if weight is None else weight
        return apply_linear(self.placed.linear, input_, own, bound_queue()), None


def place_output_layers[Model: nn.Module](models: list[Model]) -> list[Model]:
    """Turn the output layers of built models into `OutputLinear`; a post-wrap hook for Megatron.

    Megatron's models name the class of their output layer themselves, where no layer spec reaches it. Parameter and
    checkpoint stay as they are; so does an output layer that keeps its weight gradients back, or has a bias.
    """
    for layer in output_layers(models):
        if type(layer) is not ColumnParallelLinear or not layer.sequence_parallel:
            continue
        config = layer.config
        flags = TensorFlags.of(config)
        if not flags.ours:
            continue
        if layer.bias is not None or config.defer_embedding_wgrad_compute:
            continue
        size = GridSize(layer.tp_group.size(), 1)
        engines = engines_of(layer.tp_group, size, engine_of(flags.engine), GEMMS.get(flags.gemm).name)
        layer.__class__ = OutputLinear
        layer.placed = PlacedOutput(ColumnFlux(engines.tokens), engines, flags.gemm)
    return models


def output_layers(models: Iterable[nn.Module]) -> list[Any]:
    """Return the output layers of models, none for a pipeline stage without one."""
    modules = (module for model in models for module in model.modules())
    return [layer for module in modules if isinstance(layer := getattr(module, "output_layer", None), nn.Module)]
