"""The autograd function around every backend's loop."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_cp.context.layouts import Layout
from megatron_cp.context.layouts import layout as positions
from megatron_cp.context.plan import Plan, task_for
from megatron_cp.context.relayout import relayout
from megatron_cp.context.task import Task


def run(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    """Attention by a plan whose backend is chosen, of tensors on whose shapes the ranks have agreed."""
    outside = positions(plan.layout, q.shape[0] * plan.cp.size, plan.cp.size, plan.stripe)
    return _Attend.apply(q, k, v, plan.loop, task_for(q, k, v, plan), outside)


class _Attend(torch.autograd.Function):
    """A backend's loop, between a re-layout in and one out where it wants other positions than the tokens have."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, loop: ModuleType, task: Task, outside: Layout) -> Tensor:
        q, k, v = relayout([q, k, v], outside, task.runs, task.fabric)
        out, saved = loop.forward(q, k, v, task)
        ctx.save_for_backward(*saved)
        ctx.loop, ctx.task, ctx.outside = loop, task, outside
        # a backend with a number of tensors of its own saves a bare tuple
        ctx.remake = getattr(saved, "_make", tuple)
        return relayout([out], task.runs, outside, task.fabric)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        task, outside = ctx.task, ctx.outside
        (dout,) = relayout([dout], outside, task.runs, task.fabric)
        grads = ctx.loop.backward(dout, ctx.remake(ctx.saved_tensors), task)
        return *relayout(grads, task.runs, outside, task.fabric), None, None, None
