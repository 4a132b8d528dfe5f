"""The autograd function of linears: a frozen weight costs no product and no message."""

import pytest
import torch

from megatron_cp.comm import in_process
from megatron_cp.megatron.tensor.function import apply_linear
from megatron_cp.tensor.axes import engines_over
from megatron_cp.tensor.place import GridSize
from megatron_cp.tensor.summa_2d import column_linear, row_linear
from megatron_cp.tensor.traffic import LinearSize, grid_backward, grid_forward
from tests.tensor.dense import close, cut, dense
from tests.tolerances import EXACT

BYTES, RANKS = 8, 4


def trained(fabric, kind, frozen):
    """Errors of y, dx and dW of a linear on 2 x 2 ranks, whether it has a dW, and the bytes it sent backward."""
    engines = engines_over(fabric, GridSize(2, 2), "ring")
    size = LinearSize(3 * RANKS, 5 * RANKS, 2 * RANKS, kind == "column")
    whole, row, column = dense(size.tokens, size.inputs, size.outputs), *divmod(fabric.rank, 2)

    def outside(tensor):
        return tensor.chunk(RANKS)[fabric.rank]

    def inside(tensor):
        parts = tensor.chunk(RANKS)
        return torch.cat([parts[j * 2 + column] for j in range(2)]).chunk(2, 1)[row]

    before, after = (outside, inside) if size.column else (inside, outside)
    weight = cut(whole.weight, RANKS, fabric.rank, 0 if size.column else 1).clone().requires_grad_(not frozen)
    x = before(whole.x)[:, None].clone().requires_grad_()
    linear = column_linear(*engines) if size.column else row_linear(*engines)
    sent = lambda: engines.tokens.fabric.sent + engines.weights.fabric.sent  # noqa: E731
    y = apply_linear(linear, x, weight, None)
    forward = sent()
    y.backward(after(whole.dy)[:, None])
    errors = [close(y.detach()[:, 0], after(whole.y)), close(x.grad[:, 0], before(whole.dx))]
    if not frozen:
        errors.append(close(weight.grad, cut(whole.dw, RANKS, fabric.rank, 0 if size.column else 1)))
    return max(errors), weight.grad is None, forward, sent() - forward


@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_weight_has_no_gradient_and_sends_none(kind, frozen):
    size = LinearSize(3 * RANKS, 5 * RANKS, 2 * RANKS, kind == "column")
    forward, backward = grid_forward(size, 2, 2), grid_backward(size, 2, 2)
    shards, activations = size.weight / 4, size.tokens / 4 * (size.inputs if size.column else size.outputs)
    # the weight's gradient is scattered, and a column-parallel linear gathers x for it once more
    spared = (shards + (activations if size.column else 0)) if frozen else 0
    for error, without, *sent in in_process(RANKS, lambda fabric: trained(fabric, kind, frozen)):
        assert error < EXACT
        assert without == frozen
        assert sent == [BYTES * forward.total, BYTES * (backward.total - spared)]
