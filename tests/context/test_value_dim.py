"""Values narrower or wider than keys: every algorithm equals dense attention, and sends what they have."""

import pytest
import torch
from torch.func import grad, vmap

from megatron_cp.comm import in_process
from megatron_cp.context import ALGORITHMS, AUTO, BACKENDS
from megatron_cp.context.attend import attend, plan
from megatron_cp.context.packing import heads_of, packed, unpacked
from tests.cases import slow_unless
from tests.context.dense import problem, relative_error
from tests.context.test_backends import assert_equals_dense, sharded
from tests.context.test_sinks import grid_for
from tests.tolerances import EXACT

# on 2 to 8 ranks, beside all else: tests/context/test_together.py
CASES = [(3, 8, 2, 12, True), (8, 8, 2, 12, True), (3, 8, 8, 4, True), (4, 8, 2, 4, False), (4, 10, 5, 4, True)]


@pytest.mark.parametrize(("ranks", "heads", "kv_heads", "value_dim", "causal"), slow_unless([CASES[0]], CASES))
@pytest.mark.parametrize("backend", ALGORITHMS)
def test_values_of_another_dim_equal_dense(backend, ranks, heads, kv_heads, value_dim, causal):
    task = problem(12 * ranks, heads, kv_heads, causal=causal, value_dim=value_dim)
    grid = grid_for(backend, ranks)
    assert_equals_dense(in_process(ranks, lambda fabric: sharded(fabric, task, backend, grid)), task)


@pytest.mark.parametrize("outside", ["contiguous", "striped"])
@pytest.mark.parametrize("backend", slow_unless(["ring"], [entry.name for entry in BACKENDS if entry.layout]))
def test_values_of_another_dim_are_re_laid(backend, outside):
    task = problem(36, 4, 2, causal=True, value_dim=12)
    assert_equals_dense(in_process(3, lambda fabric: sharded(fabric, task, backend, outside=outside)), task)


@pytest.mark.parametrize("backend", slow_unless(["ulysses"], ["zigzag", "ulysses", "all-gather", AUTO]))
def test_the_fused_kernel_takes_values_of_another_dim(backend):
    task = problem(24, 4, 2, causal=True, value_dim=4)
    assert_equals_dense(in_process(2, lambda fabric: sharded(fabric, task, backend, kernel="torch")), task)


@pytest.mark.parametrize(
    "backend", slow_unless(["ring"], [e.name for e in BACKENDS if e.capabilities.chunks and e.name != AUTO])
)
def test_values_of_another_dim_in_chunks_equal_dense(backend):
    task, grid = problem(64, 8, 2, causal=True, value_dim=4), grid_for(backend, 4)
    assert_equals_dense(in_process(4, lambda fabric: sharded(fabric, task, backend, grid, chunks=4)), task)


@pytest.mark.parametrize("backend", ["zigzag", "all-gather", "bidirectional", "double-ring"])
def test_narrow_values_send_less(backend):
    grid = grid_for(backend, 4)

    def sent(fabric, value_dim):
        axes = {axis: fabric.subset(grid.members(axis, fabric.rank)) for axis in ("inner", "outer")} if grid else {}
        how = plan(backend, cp=fabric, **axes)
        q = torch.randn(8, 1, 4, 12)
        attend(q, q, torch.randn(8, 1, 4, value_dim), how)
        return how.sent

    narrow, wide = (in_process(4, lambda fabric, dim=dim: sent(fabric, dim)) for dim in (8, 12))
    assert [a / b for a, b in zip(narrow, wide, strict=True)] == pytest.approx([20 / 24] * 4)


def test_transforms_take_values_of_another_dim():
    q, k, v = (torch.randn(3, 6, 2, 4, dim, dtype=torch.float64) for dim in (8, 8, 12))

    def loss(q, k, v):
        return attend(q, k, v, plan("zigzag")).square().sum()

    found = vmap(grad(loss, argnums=(0, 1, 2)))(q, k, v)
    for index, rows in enumerate(zip(q, k, v, strict=True)):
        leaves = [x.clone().requires_grad_() for x in rows]
        expected = torch.autograd.grad(loss(*leaves), leaves)
        assert all(relative_error(a[index], b) <= EXACT for a, b in zip(found, expected, strict=True))


def test_an_empty_batch_has_gradients_of_its_shapes():
    q, k, v = (torch.zeros(6, 0, heads, dim, requires_grad=True) for heads, dim in ((4, 8), (2, 8), (2, 12)))
    out = attend(q, k, v, plan("zigzag"))
    assert out.shape == (6, 0, 4, 12)
    out.sum().backward()
    assert all(x.grad.shape == x.shape for x in (q, k, v))


def test_packed_tensors_come_apart_as_they_were():
    for dims in ((8, 8, 8), (8, 12, 8)):
        tensors = [torch.randn(5, 2, heads, dim) for heads, dim in zip((4, 2, 3), dims, strict=True)]
        parts = unpacked(packed(*tensors), heads_of(*tensors))
        assert all(torch.equal(a, b) for a, b in zip(parts, tensors, strict=True))
