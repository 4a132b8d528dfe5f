"""Run the linears of one layer on ranks without data for their trace, and on small ones with data for their proof."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_cp.comm import Fabric, in_process
from megatron_cp.context.trace.events import Matmul, Pass, Step, match
from megatron_cp.context.trace.record import Recorder, RecordingFabric
from megatron_cp.tensor import CUBE
from megatron_cp.tensor.axes import GridEngines, engines_over
from megatron_cp.tensor.cost import LayerLinears, Placing
from megatron_cp.tensor.cube_3d import CubeEngines, CubeLinear, cube_engines, features_over, tokens_over
from megatron_cp.tensor.linear import Linear
from megatron_cp.tensor.place import GridSize, cube_side
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
    """A linear's size, the tensors that a rank has of it, and one of the layout beside it where they differ.

    beside: attention's share of heads, beside linears on a grid; a rank's own tokens, beside those on a cube
    """

    size: LinearSize
    x: Tensor
    weight: Tensor
    dy: Tensor
    beside: Tensor


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
    on_grid = layer.linears[:2] if placing.scheme == CUBE else layer.linears
    on_cube = layer.linears[len(on_grid) :]
    held = [_tensors(size, placing.size, dtype) for size in on_grid]
    held += [_cube_tensors(size, cube_side(placing.size.tokens), dtype) for size in on_cube]
    with Recorder(*(tensor for each in held for tensor in each[1:])) as recorder:
        fabric = RecordingFabric(recorder, tuple(range(placing.size.grid.ranks)), rank)
        engines = engines_over(fabric, placing.size, placing.engine)
        runs: list[_GridRun | _CubeRun] = [
            _GridRun(engines, placing.size, number < 2) for number in range(len(on_grid))
        ]
        if on_cube:
            cube = _CubeRun(cube_engines(fabric, placing.engine))
            runs += [cube] * len(on_cube)
        for run, each in zip(runs, held, strict=True):
            run.forward(each)
        forward = recorder.take()
        for run, each in reversed(list(zip(runs, held, strict=True))):
            run.backward(each)
        return forward, recorder.take()


def _cube_tensors(size: LinearSize, side: int, dtype: torch.dtype) -> LinearTensors:
    tokens, inputs, outputs = (round(each) for each in (size.tokens, size.inputs, size.outputs))
    x, dy = (_empty(dtype, tokens // side**2, width // side) for width in (inputs, outputs))
    hidden = inputs if size.column else outputs
    weight = _empty(dtype, outputs // side**2, inputs // side)
    return LinearTensors(size, x, weight, dy, _empty(dtype, tokens // side**3, hidden))


def _empty(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _tensors(size: LinearSize, grid: GridSize, dtype: torch.dtype) -> LinearTensors:
    p = grid.grid.ranks
    tokens, seen = round(size.tokens / p), round(size.tokens / grid.weights)
    inputs, outputs = round(size.inputs), round(size.outputs)
    whole, empty = round(size.tokens), partial(_empty, dtype)
    if size.column:
        x, dy = empty(tokens, inputs), empty(seen, outputs // grid.tokens)
        return LinearTensors(size, x, empty(outputs // p, inputs), dy, empty(whole, outputs // p))
    x, dy = empty(seen, inputs // grid.tokens), empty(tokens, outputs)
    return LinearTensors(size, x, empty(outputs, inputs // p), dy, empty(whole, inputs // p))


class _GridRun:
    """One rank's linears, with the exchange beside those of attention."""

    def __init__(self, engines: GridEngines, size: GridSize, attention: bool) -> None:
        self._engines, self._size, self._attention = engines, size, attention

    def forward(self, one: LinearTensors) -> None:
        if self._attention and not one.size.column:
            self._exchange(one.beside, to_heads=False)
        y = self._linear(one.size).forward(one.x, one.weight)
        if self._attention and one.size.column:
            self._exchange(y, to_heads=True)

    def backward(self, one: LinearTensors) -> None:
        if self._attention and one.size.column:
            self._exchange(one.beside, to_heads=False)
        dx, _ = self._linear(one.size).backward(one.dy, one.x, one.weight)
        if self._attention and not one.size.column:
            self._exchange(dx, to_heads=True)

    def _linear(self, size: LinearSize) -> Linear:
        return column_linear(*self._engines) if size.column else row_linear(*self._engines)

    def _exchange(self, x: Tensor, *, to_heads: bool) -> None:
        if self._size.weights > 1:
            (heads_for_tokens if to_heads else tokens_for_heads)(x, self._size.tokens, self._engines.weights.fabric)


class _CubeRun:
    """One rank's MLP on a cube, with the exchange on each side of it."""

    def __init__(self, engines: CubeEngines) -> None:
        self._engines, self._axis = engines, engines.k.fabric

    def forward(self, one: LinearTensors) -> None:
        if one.size.column:
            features_over(one.beside, self._axis)
        y = self._linear(one.size).forward(one.x, one.weight)
        if not one.size.column:
            tokens_over(y, self._axis)

    def backward(self, one: LinearTensors) -> None:
        if not one.size.column:
            features_over(one.beside, self._axis)
        dx, _ = self._linear(one.size).backward(one.dy, one.x, one.weight)
        if one.size.column:
            tokens_over(dx, self._axis)

    def _linear(self, size: LinearSize) -> CubeLinear:
        return self._engines.linear(first=size.column, blocks=1)


def products_seconds(run: Pass, flops_per_s: float) -> float:
    """Return the seconds of a rank's products alone, at one rate."""
    return sum(event.flops for event, _ in run.steps[0] if isinstance(event, Matmul)) / flops_per_s


def prove_linears(placing: Placing) -> float:
    """Return the largest relative error of the linears of a placing in float64, on small sizes.

    Both gradients and both exchanges are compared with those of one rank; ranks are threads of this process.
    """
    p = placing.size.grid.ranks
    errors = [
        error
        for blocks, column in ((1, True), (2, True), (1, False))
        for error in in_process(p, partial(_error, placing, blocks, column))
    ]
    if placing.scheme == CUBE:
        errors += in_process(p, partial(_cube_error, placing.engine))
    return max(errors)


def _cube_error(engine: str, fabric: Fabric) -> float:
    """Return the error of a gated MLP on a cube, gate times values, and of all of its gradients on this rank."""
    p, engines = fabric.size, cube_engines(fabric, engine)
    side, axis = cube_side(p), engines.k.fabric
    made = torch.Generator().manual_seed(p)
    shapes = (2 * p, p), (4 * side**2, p), (p, 2 * side**2), (2 * p, p)
    x, first, second, dout = (torch.randn(shape, generator=made, dtype=torch.float64) for shape in shapes)
    up, down = (engines.linear(first=one, blocks=2 if one else 1) for one in (True, False))
    cut_up, cut_down = (engines.cut(first=one, blocks=2 if one else 1) for one in (True, False))
    # 1. one rank
    gate, values = (x @ first.t()).chunk(2, 1)
    dinside = dout @ second
    dy = torch.cat([dinside * values, dinside * gate], 1)
    expected = [(gate * values) @ second.t(), dy @ first, dy.t() @ x, dout.t() @ (gate * values)]
    # 2. the cube
    given = features_over(x.chunk(p)[fabric.rank], axis)
    one, other = up.forward(given, cut_up.part_of(first)).chunk(2, 1)
    out = tokens_over(down.forward(one * other, cut_down.part_of(second)), axis)
    arrived = features_over(dout.chunk(p)[fabric.rank], axis)
    inner, of_second = down.backward(arrived, one * other, cut_down.part_of(second))
    dx, of_first = up.backward(torch.cat([inner * other, inner * one], 1), given, cut_up.part_of(first))
    found = [out, tokens_over(dx, axis), of_first, of_second]
    parts = [*(each.chunk(p)[fabric.rank] for each in expected[:2])]
    parts += [cut_up.part_of(expected[2]), cut_down.part_of(expected[3])]
    return max(float((ours - its).abs().max() / its.abs().max()) for ours, its in zip(found, parts, strict=True))


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
