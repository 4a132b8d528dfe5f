"""Autograd functions of the linears and of exchanges between their layouts; activations are [s, b, features]."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_cp.pipeline.split_backward import WeightQueue, accumulate
from megatron_cp.tensor.linear import Linear


@dataclass(frozen=True)
class LinearCall:
    """A linear and its parameter, in an object so that autograd sees neither.

    queue: where the weight gradient waits, in a step of a split schedule; None where autograd takes it
    """

    linear: Linear
    weight: Tensor
    queue: WeightQueue | None


class ParallelLinear(torch.autograd.Function):
    """A linear over ranks. `weight` is the parameter where its gradient goes to autograd, and None elsewhere."""

    @staticmethod
    def forward(ctx: Any, call: LinearCall, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(x)
        y = call.linear.forward(x.flatten(0, 1), call.weight.detach())
        # (s b) n -> s b n, as torch.matmul: the cross entropy writes into the logits, which autograd forbids for a view
        result: Tensor = torch.ops.aten._unsafe_view(y, (len(y) // x.shape[1], x.shape[1], y.shape[1]))
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        call, (x,) = ctx.call, ctx.saved_tensors
        dy, rows, weight = gradient.flatten(0, 1), x.flatten(0, 1), call.weight.detach()
        of_input, of_weight = ctx.needs_input_grad[1], ctx.needs_input_grad[2] or call.queue is not None
        if not of_weight:
            return None, _like(call.linear.input_gradient(dy, weight), x), None
        if not of_input:
            return None, None, call.linear.weight_gradient(dy, rows)
        if call.queue is not None and call.queue.putting_off:
            dx = call.linear.input_gradient(dy, weight)
            # parts of the tokens wait, and are gathered once more
            call.queue.put(partial(_weight_half, call), rows, dy)
            return None, _like(dx, x), None
        dx, found = call.linear.backward(dy, rows, weight)
        if call.queue is None:
            return None, _like(dx, x), found
        accumulate(call.weight, found)
        return None, _like(dx, x), None


def _like(dx: Tensor, x: Tensor) -> Tensor:
    return dx.view(x.shape)


def _weight_half(call: LinearCall, x: Tensor, dy: Tensor) -> None:
    accumulate(call.weight, call.linear.weight_gradient(dy, x))


def apply_linear(linear: Linear, x: Tensor, weight: Tensor, queue: WeightQueue | None) -> Tensor:
    """Return the linear of x [s, b, k]; its weight gradient waits in the queue while a split schedule has it open.

    Without a gradient of the input there would be no backward at all once the weight is out of autograd.
    """
    waits = queue is not None and queue.open and weight.requires_grad and weight.is_leaf and x.requires_grad
    call = LinearCall(linear, weight, queue if waits else None)
    result: Tensor = ParallelLinear.apply(call, x, None if waits else weight)
    return result


class Exchange(torch.autograd.Function):
    """Exchange tokens for features between ranks by `there`, and gradients by `back`, its inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return _exchanged(x, there)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _exchanged(gradient, ctx.back), None, None


def _exchanged(x: Tensor, exchange: Callable[[Tensor], Tensor]) -> Tensor:
    # (s b) n -> s b n
    return exchange(x.flatten(0, 1)).unflatten(0, (-1, x.shape[1]))
