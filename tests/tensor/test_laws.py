"""Linears over every grid of 2 to 8 ranks equal the linear of one rank, and send what their formulas say."""

import pytest
import torch

from megatron_cp.comm import SingleFabric, in_process
from megatron_cp.grid import Grid, divisors
from megatron_cp.tensor import ENGINES
from megatron_cp.tensor.cube_3d import CubeLinear, features_over, tokens_over
from megatron_cp.tensor.flux import ColumnFlux, RowFlux
from megatron_cp.tensor.summa_2d import column_linear, heads_for_tokens, row_linear, tokens_for_heads
from megatron_cp.tensor.tesseract import depth
from megatron_cp.tensor.traffic import (
    LinearSize,
    SentElements,
    cube_backward,
    cube_exchange,
    cube_forward,
    grid_backward,
    grid_forward,
    heads_exchange,
)
from tests.cases import slow_unless
from tests.tensor.dense import close, cut, dense, tokens_of
from tests.tolerances import EXACT

GRIDS = [(ranks // weights, weights) for ranks in range(2, 9) for weights in divisors(ranks)]
LOCAL = ["collective", "ring"]
ON_GRIDS = [*LOCAL, "panels"]
BYTES = 8


def axis(fabric, ranks):
    return SingleFabric() if len(ranks) == 1 else fabric.subset(ranks)


def axes(fabric, engine, tokens, weights):
    """Engines over the token axis and the weight axis."""
    grid, made = Grid(weights, tokens, names=("weights", "tokens")), ENGINES.get(engine).load()
    return [made(axis(fabric, grid.members(name, fabric.rank))) for name in ("tokens", "weights")]


def kinds(tokens, weights):
    p = tokens * weights
    return {
        "column": (LinearSize(3 * p, 5, 2 * p, True), 1),
        "gated column": (LinearSize(3 * p, 5, 4 * p, True), 2),
        "row": (LinearSize(3 * p, 2 * p, 5, False), 1),
    }


def errors_and_bytes(fabric, engine, tokens, weights, kind):
    size, blocks = kinds(tokens, weights)[kind]
    whole, p, rank = dense(size.tokens, size.inputs, size.outputs), fabric.size, fabric.rank
    over_tokens, over_weights = axes(fabric, engine, tokens, weights)
    row, column = divmod(rank, weights)
    shard = cut(whole.weight, p, rank, 0 if size.column else 1, blocks)

    def features(tensor):
        """The grid's row of features of the column's tokens; gathered shards keep gate and values apart."""
        return cut(tokens_of(tensor, tokens, weights, column), tokens, row, 1, blocks)

    def tokens_alone(tensor):
        return tensor.chunk(p)[rank]

    before, after = (tokens_alone, features) if size.column else (features, tokens_alone)
    linear = column_linear(over_tokens, over_weights, blocks) if size.column else row_linear(over_tokens, over_weights)
    x, dy, sent = before(whole.x), after(whole.dy), lambda: over_tokens.fabric.sent + over_weights.fabric.sent
    y = linear.forward(x, shard)
    forward = sent()
    dx, dw = linear.backward(dy, x, shard)
    backward = sent() - forward
    apart = linear.input_gradient(dy, shard), linear.weight_gradient(dy, x)
    split = sent() - forward - backward
    expected = cut(whole.dw, p, rank, 0 if size.column else 1, blocks)
    found = [
        close(y, after(whole.y)),
        *(close(gradient, before(whole.dx)) for gradient in (dx, apart[0])),
        *(close(gradient, expected) for gradient in (dw, apart[1])),
    ]
    return max(found), (forward, backward, split)


@pytest.mark.parametrize("engine", ON_GRIDS)
@pytest.mark.parametrize(("tokens", "weights"), slow_unless(lambda t, w: t * w in (2, 3, 6, 8), GRIDS))
def test_linears_on_a_grid_equal_one_rank_and_send_what_the_formulas_say(tokens, weights, engine):
    for kind, (size, _) in kinds(tokens, weights).items():
        for error, sent in in_process(
            tokens * weights, lambda fabric, kind=kind: errors_and_bytes(fabric, engine, tokens, weights, kind)
        ):
            assert error < EXACT, kind
            assert sent == pytest.approx(
                [
                    BYTES * grid_forward(size, tokens, weights).total,
                    BYTES * grid_backward(size, tokens, weights).total,
                    BYTES * grid_backward(size, tokens, weights, split=True).total,
                ]
            ), kind


@pytest.mark.parametrize("engine", LOCAL)
@pytest.mark.parametrize("ranks", range(2, 9))
def test_one_dimension_needs_no_grid(ranks, engine):
    size = LinearSize(2 * ranks, 3, ranks, True)
    whole = dense(size.tokens, size.inputs, size.outputs)

    def run(fabric):
        of_tokens = ENGINES.get(engine).load()(fabric)
        x, shard = whole.x.chunk(ranks)[fabric.rank], whole.weight.chunk(ranks)[fabric.rank]
        column, row = ColumnFlux(of_tokens), RowFlux(of_tokens)
        y = column.forward(x, shard)
        # the gradient of a column-parallel linear's input is what a row-parallel one makes of W^T
        return close(y, whole.y.chunk(ranks, 1)[fabric.rank]), close(
            row.forward(y, shard.t().contiguous()), (whole.y @ whole.weight).chunk(ranks)[fabric.rank]
        )

    assert max(error for errors in in_process(ranks, run) for error in errors) < EXACT


@pytest.mark.parametrize(("tokens", "weights"), [grid for grid in GRIDS if grid[1] > 1])
def test_heads_are_exchanged_for_tokens_in_order_and_back(tokens, weights):
    p, batch, features = tokens * weights, 2, 3
    whole = dense(2 * batch * p, 1, features * p).y

    def run(fabric):
        fabric_of_weights = axes(fabric, "collective", tokens, weights)[1].fabric
        row, column = divmod(fabric.rank, weights)
        given = tokens_of(whole, tokens, weights, column).chunk(tokens, 1)[row]
        heads = heads_for_tokens(given, tokens, fabric_of_weights)
        assert torch.equal(heads, whole.chunk(p, 1)[fabric.rank])
        assert torch.equal(tokens_for_heads(heads, tokens, fabric_of_weights), given)
        return fabric_of_weights.sent

    expected = 2 * BYTES * heads_exchange(len(whole), whole.shape[1], tokens, weights).exchange
    assert in_process(p, run) == pytest.approx([expected] * p)


def cube_run(fabric, engine, side, blocks):
    tokens, hidden, width = 2 * side**3, 2 * side**3, blocks * side**2
    first, grid = dense(tokens, hidden, width), Grid(side, side, side, names=("k", "j", "i"))
    i, j, k = fabric.rank // side**2, fabric.rank // side % side, fabric.rank % side
    by = {name: ENGINES.get(engine).load()(fabric.subset(grid.members(name, fabric.rank))) for name in "ijk"}
    linear = CubeLinear(inputs=by["j"], weights=by["i"], outputs=by["k"], blocks=blocks)
    # tokens of i, then of j inside them, then of k; W: outputs of j, then of i inside them, inputs of k
    local = first.x.chunk(side**3)[fabric.rank]
    shard = cut(first.weight, side**2, j * side + i, 0, blocks).chunk(side, 1)[k]
    x = features_over(local, by["k"].fabric)
    exchanged = by["k"].fabric.sent
    errors = [close(tokens_over(x, by["k"].fabric), local)]
    sent = lambda: sum(engine.fabric.sent for engine in by.values())  # noqa: E731
    start = sent()
    y = linear.forward(x, shard)
    forward = sent() - start
    # rows of y: the tokens of (i, k, j...) that reduce-scatter leaves; gather them all to compare
    rows = _rows_of_output(tokens, side, i, k)
    mine = cut(first.y, side, j, 1, blocks)[rows]
    dy = cut(first.dy, side, j, 1, blocks)[rows]
    start = sent()
    dx, dw = linear.backward(dy, x, shard)
    backward = sent() - start
    start = sent()
    apart = linear.input_gradient(dy, shard), linear.weight_gradient(dy, x)
    split = sent() - start
    expected_dx = features_over(first.dx.chunk(side**3)[fabric.rank], by["k"].fabric)
    expected_dw = cut(first.dw, side**2, j * side + i, 0, blocks).chunk(side, 1)[k]
    errors += [close(y, mine)]
    errors += [close(found, expected_dx) for found in (dx, apart[0])]
    errors += [close(found, expected_dw) for found in (dw, apart[1])]
    return max(errors), (exchanged, forward, backward, split)


def _rows_of_output(tokens, side, i, k):
    """The tokens of a rank's y: the input gathered over j holds parts (j, k') of i; it keeps the k-th piece of it."""
    parts = torch.arange(tokens).chunk(side**3)
    gathered = torch.cat([parts[i * side**2 + j * side + kk] for j in range(side) for kk in range(side)])
    return gathered.chunk(side)[k]


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("engine", LOCAL)
def test_linears_on_a_cube_equal_one_rank_and_send_what_the_formulas_say(engine, blocks):
    side = 2
    tokens, hidden, width = 2 * side**3, 2 * side**3, blocks * side**2
    size = LinearSize(tokens, hidden, width, True)
    expected = [
        cube_exchange(tokens, hidden, side).total,
        cube_forward(size, side).total,
        cube_backward(size, side).total,
        cube_backward(size, side, split=True).total,
    ]
    for error, sent in in_process(side**3, lambda fabric: cube_run(fabric, engine, side, blocks)):
        assert error < EXACT
        assert sent == pytest.approx([BYTES * elements for elements in expected])


def test_a_square_grid_sends_less_than_one_dimension_once_tokens_exceed_the_break_even():
    """At 2 x 2 that is 9/4 of the hidden size: fewer activations against three times the weights and an exchange."""

    def sent(tokens, per_hidden, hidden=64):
        grid, total = (tokens, 4 // tokens), SentElements()
        linears = [
            LinearSize(per_hidden * hidden, hidden, 3 * hidden, True),
            LinearSize(per_hidden * hidden, hidden, hidden, False),
            LinearSize(per_hidden * hidden, hidden, 4 * hidden, True),
            LinearSize(per_hidden * hidden, 4 * hidden, hidden, False),
        ]
        for linear in linears:
            total = total.plus(grid_forward(linear, *grid)).plus(grid_backward(linear, *grid))
        return total.plus(heads_exchange(per_hidden * hidden, 4 * hidden, *grid), 2).total

    assert sent(2, 2.2) > sent(4, 2.2)
    assert sent(2, 2.25) == sent(4, 2.25)
    assert sent(2, 2.3) < sent(4, 2.3)


def test_a_ring_rounds_each_partial_result_once_and_adds_in_float32():
    ranks = 4
    whole = dense(8 * ranks, 64, 16, torch.bfloat16)

    def run(fabric):
        tokens = ENGINES.get("ring").load()(fabric)
        mine = cut(whole.x, ranks, fabric.rank, 1)
        return tokens.matmul_rs(mine, cut(whole.weight, ranks, fabric.rank, 1).t())

    found = torch.cat(in_process(ranks, run))
    parts = [cut(whole.x, ranks, rank, 1) @ cut(whole.weight, ranks, rank, 1).t() for rank in range(ranks)]
    exact = sum(part.double() for part in parts)
    # one unit of bf16's last place at most from the sum of partial results that were rounded once each
    assert bool(((found.double() - exact).abs() <= exact.abs() * 2**-8).all())


def test_the_depth_of_a_tesseract_is_context_or_data_parallelism():
    assert depth(2, 4) == ("context parallel", 2)
    assert depth(1, 4) == ("data parallel", 4)
    with pytest.raises(ValueError, match=r"--tp-comm-type 2\.5d takes its depth"):
        depth(1, 1)
