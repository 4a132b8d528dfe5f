"""On a GPU every backend equals dense attention; its ranks are threads that share the GPU."""

import pytest
import torch

from megatron_cp.comm import in_process
from megatron_cp.context import ALGORITHMS, BACKENDS
from megatron_cp.context.attend import plan
from megatron_cp.context.layouts import layout
from megatron_cp.context.task import Task
from megatron_cp.grid import Grid
from megatron_cp.kernels.reference import ReferenceKernel
from tests.context.dense import problem, relative_error
from tests.tolerances import BF16_RATIO, EXACT

GRIDS = {4: Grid(2, 2), 6: Grid(3, 2)}


def tokens_of(runs):
    return torch.tensor([position for run in runs for position in run])


def sharded(fabric, task, backend, kernel):
    """This rank's tokens and out, dq, dk, dv: the backend's own loop, without autograd."""
    entry = BACKENDS.get(backend)
    grid = GRIDS.get(fabric.size)
    axes = (
        {axis: fabric.subset(grid.members(axis, fabric.rank)) for axis in ("inner", "outer")}
        if entry.needs_grid
        else {}
    )
    made = plan(backend, cp=fabric, causal=task.causal, kernel=kernel, **axes)
    runs = layout(entry.layout or "zigzag", task.q.shape[0], fabric.size)
    heads = (task.q.shape[2], task.k.shape[2])
    job = Task(
        fabric=fabric,
        layout=runs,
        mask=made.mask,
        scale=task.q.shape[3] ** -0.5,
        kernel=made.kernel_for(task.q, task.v)[0],
        heads=heads,
        axes=made.axes,
    )
    mine, loop = tokens_of(runs[fabric.rank]), entry.load()
    out, saved = loop.forward(task.q[mine], task.k[mine], task.v[mine], job)
    return mine, (out, *loop.backward(task.dout[mine], saved, job))


def whole(parts):
    order = torch.cat([mine for mine, _ in parts]).argsort()
    return [torch.cat(tensors)[order] for tensors in zip(*(tensors for _, tensors in parts), strict=True)]


def unsharded(kernel, task):
    how = {"scale": task.q.shape[3] ** -0.5, "causal": task.causal}
    out, lse = kernel.forward(task.q, task.k, task.v, **how)
    return out, *kernel.backward(task.dout, task.q, task.k, task.v, out, lse, **how)


def on(task, device, dtype):
    return task._replace(**{x: getattr(task, x).to(device, dtype) for x in ("q", "k", "v", "dout")})


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("groups", [12, 4, 1])
@pytest.mark.parametrize("ranks", [4, 6])
@pytest.mark.parametrize("backend", ALGORITHMS)
def test_backend_equals_dense(device, backend, ranks, groups, causal):
    task = on(problem(12 * ranks, 12, groups, causal=causal), device, torch.float64)
    found = whole(in_process(ranks, lambda fabric: sharded(fabric, task, backend, "reference")))
    for what, ours, theirs in zip(("out", "dq", "dk", "dv"), found, unsharded(ReferenceKernel(), task), strict=True):
        assert relative_error(ours, theirs) <= EXACT, what


@pytest.mark.parametrize("ranks", [4, 6])
@pytest.mark.parametrize("backend", ALGORITHMS)
def test_bf16_is_as_exact_as_the_unsharded_kernel(device, backend, ranks):
    task = on(problem(384 * ranks, 12, 4, causal=True, dim=64), device, torch.bfloat16)
    exact = unsharded(ReferenceKernel(), on(task, device, torch.float64))
    alone = unsharded(plan(backend="all-gather").kernel_for(task.q, task.v)[0], task)
    found = whole(in_process(ranks, lambda fabric: sharded(fabric, task, backend, "auto")))
    for what, ours, single, true in zip(("out", "dq", "dk", "dv"), found, alone, exact, strict=True):
        # Frobenius: the largest element of a bfloat16 error is a matter of luck
        error, own = ((x.double() - true).norm() / true.norm() for x in (ours, single))
        assert error <= BF16_RATIO * own, what
