"""The autograd function around every backend's loop."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from megatron_cp.context import layouts
from megatron_cp.context.layouts import Layout
from megatron_cp.context.loop import Loop
from megatron_cp.context.plan import Plan, task_for
from megatron_cp.context.relayout import relayout
from megatron_cp.context.task import Task
from megatron_cp.kernels.protocol import PreparesBackward


def run(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    """Attend by a plan whose backend is chosen; the caller guarantees that all ranks hold tensors of one shape."""
    layout = layouts.layout(plan.layout, q.shape[0] * plan.cp.size, plan.cp.size, plan.stripe)
    return _Attend.apply(q, k, v, plan.loop, task_for(q, k, v, plan), layout)


class _Attend(torch.autograd.Function):
    """A backend's loop, between two re-layouts if it needs other positions than the tokens have."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, loop: Loop[Any], task: Task, layout: Layout) -> Tensor:
        q, k, v = relayout([q, k, v], layout, task.layout, task.fabric)
        out, saved = loop.forward(q, k, v, task)
        # autograd keeps a flat list of tensors, the loop gets back the tuple that it made of them
        tensors, ctx.saved_as = tree_flatten(saved)
        ctx.save_for_backward(*tensors)
        ctx.loop, ctx.task, ctx.layout = loop, task, layout
        return relayout([out], task.layout, layout, task.fabric)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        task, layout = ctx.task, ctx.layout
        if isinstance(task.kernel, PreparesBackward):
            task = task.on(task.fabric, task.layout, task.kernel.for_backward())
        (dout,) = relayout([dout], layout, task.layout, task.fabric)
        loop: Loop[Any] = ctx.loop
        grads = loop.backward(dout, tree_unflatten(ctx.saved_tensors, ctx.saved_as), task)
        return *relayout(grads, task.layout, layout, task.fabric), None, None, None
