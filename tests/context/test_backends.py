"""Every backend equals dense attention, on any number of ranks."""

import pytest
import torch

from megatron_cp.comm import in_process
from megatron_cp.context import ALGORITHMS, BACKENDS, PLACEMENTS
from megatron_cp.context.attend import attend, plan
from megatron_cp.context.layouts import indices
from megatron_cp.grid import Grid
from tests.cases import slow_unless
from tests.context.dense import Problem, dense, problem, relative_error
from tests.ranks import run_ranks
from tests.tolerances import EXACT

RANKS = [2, 3, 4, 5, 6, 8]
HEADS = [(8, 8), (8, 2), (8, 1)]
# two, an odd number and a power of two; all kinds of heads on two of them
RANKS_AND_HEADS = slow_unless(
    [*((2, *heads) for heads in HEADS), (3, 8, 2), (8, 8, 2)], [(ranks, *heads) for ranks in RANKS for heads in HEADS]
)


def grids(ranks):
    return [Grid(inner, ranks // inner) for inner in range(1, ranks + 1) if ranks % inner == 0]


GRIDS_AND_HEADS = slow_unless(
    [*((2, 2, *heads) for heads in HEADS), (1, 2, 8, 2), (3, 1, 8, 2), (3, 2, 8, 2), (2, 4, 8, 2)],
    [(grid.inner, grid.outer, *heads) for ranks in RANKS for grid in grids(ranks) for heads in HEADS],
)


def sharded(fabric, task: Problem, backend: str, grid=None, outside="zigzag", kernel="reference", call=None, **choices):
    """out, dq, dk, dv of this rank's tokens, and where these stand in the sequence."""
    mine = torch.tensor(indices(outside, task.q.shape[0], fabric.size, fabric.rank))
    axes = {axis: fabric.subset(grid.members(axis, fabric.rank)) for axis in ("inner", "outer")} if grid else {}
    made = plan(
        backend, cp=fabric, causal=task.causal, window=task.window, kernel=kernel, layout=outside, **axes, **choices
    )
    q, k, v = (x[mine].requires_grad_() for x in task[:3])
    out = attend(q, k, v, made, **(call or {}))
    return mine, (out.detach(), *torch.autograd.grad(out, (q, k, v), task.dout[mine]))


def whole(parts):
    """The parts of all ranks put together."""
    results = []
    for index in range(4):
        tensors = [tensors[index] for _, tensors in parts]
        result = tensors[0].new_empty((sum(map(len, tensors)), *tensors[0].shape[1:]))
        for (mine, _), tensor in zip(parts, tensors, strict=True):
            result[mine] = tensor
        results.append(result)
    return results


def assert_equals_dense(parts, task, tolerance=EXACT):
    for name, found, expected in zip(("out", "dq", "dk", "dv"), whole(parts), dense(task), strict=True):
        assert relative_error(found, expected) <= tolerance, name


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("ranks", "heads", "kv_heads"), RANKS_AND_HEADS)
@pytest.mark.parametrize("backend", [name for name in ALGORITHMS if not BACKENDS.get(name).needs_grid])
def test_backend_equals_dense(backend, ranks, heads, kv_heads, causal):
    task = problem(12 * ranks, heads, kv_heads, causal=causal)
    assert_equals_dense(in_process(ranks, lambda fabric: sharded(fabric, task, backend)), task)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("inner", "outer", "heads", "kv_heads"), GRIDS_AND_HEADS)
@pytest.mark.parametrize(
    ("backend", "placement"),
    [
        (entry.name, placement)
        for entry in BACKENDS
        if entry.needs_grid
        for placement in (PLACEMENTS if entry.capabilities.placement else ["head-first"])
    ],
)
def test_backend_on_a_grid_equals_dense(backend, inner, outer, placement, heads, kv_heads, causal):
    ranks, grid = inner * outer, Grid(inner, outer)
    task = problem(12 * ranks, heads, kv_heads, causal=causal)
    parts = in_process(ranks, lambda fabric: sharded(fabric, task, backend, grid, placement=placement))
    assert_equals_dense(parts, task)


WINDOWS = [(True, (5, None)), (True, (20, 0)), (False, (9, 4)), (False, (0, 2)), (False, (None, 7)), (True, (1, 0))]


# the reference takes windows, in one call a band; torch's op for the CPU takes full and causal tiles
KERNELS_AND_WINDOWS = slow_unless(
    [*(("reference", *mask) for mask in WINDOWS), ("torch", True, (5, None)), ("torch", False, (9, 4))],
    [(kernel, *mask) for kernel in ("reference", "torch") for mask in WINDOWS],
)


@pytest.mark.parametrize(("kernel", "causal", "window"), KERNELS_AND_WINDOWS)
@pytest.mark.parametrize("ranks", slow_unless([3], [2, 3, 4, 8]), ids=lambda n: f"p{n}")
@pytest.mark.parametrize("backend", ALGORITHMS)
def test_backend_equals_dense_in_a_window(backend, ranks, kernel, causal, window):
    task = problem(12 * ranks, 8, 2, causal=causal)._replace(window=window)
    grid = grids(ranks)[len(grids(ranks)) // 2] if BACKENDS.get(backend).needs_grid else None
    assert_equals_dense(in_process(ranks, lambda fabric: sharded(fabric, task, backend, grid, kernel=kernel)), task)


@pytest.mark.parametrize("outside", ["contiguous", "striped"])
@pytest.mark.parametrize("backend", [entry.name for entry in BACKENDS if entry.layout])
def test_backend_takes_tokens_in_any_layout(backend, outside):
    task = problem(36, 4, 2, causal=True)
    assert_equals_dense(in_process(3, lambda fabric: sharded(fabric, task, backend, outside=outside)), task)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(7, 7), (10, 5), (12, 3), (6, 2)])
@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
def test_ulysses_deals_heads_unevenly(ranks, heads, kv_heads, causal):
    task = problem(12 * ranks, heads, kv_heads, causal=causal)
    assert_equals_dense(in_process(ranks, lambda fabric: sharded(fabric, task, "ulysses")), task)


def test_ulysses_refuses_fewer_heads_than_ranks():
    task = problem(36, 2, 1, causal=True)
    with pytest.raises(ValueError, match="3 ranks cannot share 2 query heads"):
        in_process(3, lambda fabric: sharded(fabric, task, "ulysses"))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"backend": "zigzig"}, "unknown context-parallel backend 'zigzig'; did you mean 'zigzag'"),
        ({"backend": "usp"}, "backend 'usp' needs two axes of ranks"),
        ({"backend": "ring", "layout": "zigzak"}, "unknown layout 'zigzak'; did you mean 'zigzag'"),
        ({"backend": "usp", "placement": "heads"}, "unknown placement 'heads'"),
        ({"backend": "zigzag", "placement": "context-first"}, "got 'context-first' with backend 'zigzag', .* 'usp' or"),
    ],
)
def test_plan_refuses_by_name(choices, message):
    with pytest.raises(ValueError, match=message):
        plan(**choices)


def test_lengths_that_do_not_fit_are_refused_before_anything_is_sent():
    def body(fabric):
        made = plan("zigzag", cp=fabric)
        x = torch.zeros(7, 1, 2, 8, dtype=torch.float64)
        with pytest.raises(
            ValueError, match=r"needs S divisible by 2 \* context_parallel_size = 6, got S = 21; .*s b h d"
        ):
            attend(x, x, x, made)
        return fabric.sent

    assert in_process(3, body) == [0, 0, 0]


def over_gloo(task, backend, grid, kernel):
    import torch.distributed as dist

    from megatron_cp.comm import GroupFabric

    dist.init_process_group("gloo")
    fabric = GroupFabric(dist.group.WORLD)
    result = sharded(fabric, task, backend, grid, kernel=kernel)
    dist.barrier()
    return result


@pytest.mark.smoke
@pytest.mark.parametrize("kernel", slow_unless(["torch"], ["reference", "torch"]))
@pytest.mark.parametrize("backend", BACKENDS.names)
def test_backend_equals_dense_over_gloo(backend, kernel):
    task = problem(48, 8, 2, causal=True)
    grid = Grid(2, 2) if BACKENDS.get(backend).needs_grid else None
    assert_equals_dense(run_ranks(4, over_gloo, task, backend, grid, kernel), task)


@pytest.mark.parametrize("backend", BACKENDS.names)
def test_ranks_with_different_lengths_are_found_by_all(backend):
    def body(fabric):
        x = torch.zeros(12 + 12 * (fabric.rank == 1), 1, 4, 8, dtype=torch.float64)
        grid = Grid(2, 2) if BACKENDS.get(backend).needs_grid else None
        axes = {axis: fabric.subset(grid.members(axis, fabric.rank)) for axis in ("inner", "outer")} if grid else {}
        with pytest.raises(ValueError, match="got rank 0: 12, rank 1: 24, rank 2: 12, rank 3: 12; pad"):
            attend(x, x, x, plan(backend, cp=fabric, **axes))
        return fabric.sent

    assert in_process(4, body) == [0, 0, 0, 0]
