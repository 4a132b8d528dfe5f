"""Run the linears of one layer on ranks without data for their trace, and on small ones with data for their proof."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_cp.comm import Fabric, in_process
from megatron_cp.context.trace.events import Matmul, Pass, Step, match
from megatron_cp.context.trace.record import Recorder, RecordingFabric
from megatron_cp.tensor.axes import GridEngines, engines_over
from megatron_cp.tensor.cost import LayerLinears, Placing
from megatron_cp.tensor.linear import Linear
from megatron_cp.tensor.place import GridSize
from megatron_cp.tensor.summa_2d import column_linear, heads_for_tokens, row_linear, tokens_for_heads
from megatron_cp.tensor.traffic import LinearSize


class LinearTrace(NamedTuple):
    """Both passes of a layer's linears; norms, attention and activations between them are left out."""

    forward: Pass
    backward: Pass

    def sent(self) -> int:
        """Bytes that a rank sends in both passes; all send equally many."""
        return max(self.forward.sent) + max(self.backward.sent)


class LinearTensors(NamedTuple):
    """A linear's size and the tensors that a rank has of it, and those of attention's layout where they differ."""

    size: LinearSize
    x: Tensor
    weight: Tensor
    dy: Tensor
    heads: Tensor


def record_linears(layer: LayerLinears, placing: Placing, dtype: str) -> LinearTrace:
    """Return the trace of a layer's linears on the ranks of a placing, without computing or sending anything.

    Raises UnmatchedError for ranks that would hang.
    """
    made = getattr(torch, dtype)
    ranks = range(placing.size.grid.ranks)
    forward, backward = zip(*(_record_rank(layer, placing, made, rank) for rank in ranks), strict=True)
    trace = LinearTrace(Pass(forward, 0), Pass(backward, 0))
    for run in trace:
        match(run)
    return trace


def peak_bytes(layer: LayerLinears, placing: Placing, dtype: str) -> int:
    """Return the most bytes that one linear gathers and makes at once on the first rank of a placing."""
    return max(Pass((steps,), 0).peak[0] for steps in _record_rank(layer, placing, getattr(torch, dtype), 0))


def _record_rank(
    layer: LayerLinears, placing: Placing, dtype: torch.dtype, rank: int
) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    held = [_tensors(size, placing.size, dtype) for size in layer.linears]
    with Recorder(*(tensor for each in held for tensor in each[1:])) as recorder:
        fabric = RecordingFabric(recorder, tuple(range(placing.size.grid.ranks)), rank)
        run = _LayerRun(engines_over(fabric, placing.size, placing.engine), placing.size)
        for number, each in enumerate(held):
            run.forward(each, attention=number < 2)
        forward = recorder.take()
        for number, each in reversed(list(enumerate(held))):
            run.backward(each, attention=number < 2)
        return forward, recorder.take()


def _tensors(size: LinearSize, grid: GridSize, dtype: torch.dtype) -> LinearTensors:
    p = grid.grid.ranks
    tokens, seen = round(size.tokens / p), round(size.tokens / grid.weights)
    inputs, outputs = round(size.inputs), round(size.outputs)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    whole = round(size.tokens)
    if size.column:
        x, dy = empty(tokens, inputs), empty(seen, outputs // grid.tokens)
        return LinearTensors(size, x, empty(outputs // p, inputs), dy, empty(whole, outputs // p))
    x, dy = empty(seen, inputs // grid.tokens), empty(tokens, outputs)
    return LinearTensors(size, x, empty(outputs, inputs // p), dy, empty(whole, inputs // p))


class _LayerRun:
    """One rank's linears, with the exchange around attention."""

    def __init__(self, engines: GridEngines, size: GridSize) -> None:
        self._engines, self._size = engines, size

    def forward(self, one: LinearTensors, *, attention: bool) -> None:
        if attention and not one.size.column:
            self._exchange(one.heads, to_heads=False)
        y = self._linear(one.size).forward(one.x, one.weight)
        if attention and one.size.column:
            self._exchange(y, to_heads=True)

    def backward(self, one: LinearTensors, *, attention: bool) -> None:
        if attention and one.size.column:
            self._exchange(one.heads, to_heads=False)
        dx, _ = self._linear(one.size).backward(one.dy, one.x, one.weight)
        if attention and not one.size.column:
            self._exchange(dx, to_heads=True)

    def _linear(self, size: LinearSize) -> Linear:
        return column_linear(*self._engines) if size.column else row_linear(*self._engines)

    def _exchange(self, x: Tensor, *, to_heads: bool) -> None:
        if self._size.weights > 1:
            (heads_for_tokens if to_heads else tokens_for_heads)(x, self._size.tokens, self._engines.weights.fabric)


def products_seconds(run: Pass, flops_per_s: float) -> float:
    """Return the seconds of a rank's products alone, at one rate."""
    return sum(event.flops for event, _ in run.steps[0] if isinstance(event, Matmul)) / flops_per_s


def prove_linears(placing: Placing) -> float:
    """Return the largest relative error of the linears of a placing in float64, on small sizes.

    Both gradients and both exchanges are compared with those of one rank; ranks are threads of this process.
    """
    p = placing.size.grid.ranks
    return max(
        error
        for blocks, column in ((1, True), (2, True), (1, False))
        for error in in_process(p, partial(_error, placing, blocks, column))
    )


def _error(placing: Placing, blocks: int, column: bool, fabric: Fabric) -> float:
    (tokens, weights), p = placing.size, fabric.size
    row, mine = divmod(fabric.rank, weights)
    made = torch.Generator().manual_seed(p)
    x, weight, dy = (
        torch.randn(shape, generator=made, dtype=torch.float64)
        for shape in (((2 * p, 3 * p), (4 * p, 3 * p), (2 * p, 4 * p)))
    )

    def features(tensor: Tensor) -> Tensor:
        parts = tensor.chunk(p)
        seen = torch.cat([parts[j * weights + mine] for j in range(tokens)])
        return torch.cat([block.chunk(tokens, 1)[row] for block in seen.chunk(blocks, 1)], 1)

    def shard(tensor: Tensor) -> Tensor:
        dim = 0 if column else 1
        return torch.cat([block.chunk(p, dim)[fabric.rank] for block in tensor.chunk(blocks, dim)], dim)

    def local(tensor: Tensor) -> Tensor:
        return tensor.chunk(p)[fabric.rank]

    engines = engines_over(fabric, placing.size, placing.engine)
    linear = column_linear(*engines, blocks) if column else row_linear(*engines)
    before, after = (local, features) if column else (features, local)
    dx, dw = linear.backward(after(dy), before(x), shard(weight))
    pairs = [
        (linear.forward(before(x), shard(weight)), after(x @ weight.t())),
        (dx, before(dy @ weight)),
        (dw, shard(dy.t() @ x)),
    ]
    if blocks == 1 and weights > 1:
        heads = heads_for_tokens(features(dy), tokens, engines.weights.fabric)
        pairs += [(heads, dy.chunk(p, 1)[fabric.rank])]
        pairs += [(tokens_for_heads(heads, tokens, engines.weights.fabric), features(dy))]
    return max(float((found - expected).abs().max() / expected.abs().max()) for found, expected in pairs)
