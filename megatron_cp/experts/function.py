"""Autograd function of a linear over all experts of a rank, whose weight gradients may be computed elsewhere."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_cp.experts.product import GroupedProduct, Groups

WeightHalf = Callable[[Tensor, Tensor], Sequence[Tensor]]
"""Returns the gradients of the weights from dy and x."""


@dataclass(frozen=True)
class GroupedCall:
    """A linear over experts with its parameters, in an object so that autograd sees neither.

    elsewhere: called in backward with the weight half, dy and x; None where autograd takes the weights' gradients
    """

    product: GroupedProduct
    groups: Groups
    weights: tuple[Tensor, ...]
    elsewhere: Callable[[WeightHalf, Tensor, Tensor], None] | None = None


class GroupedLinear(torch.autograd.Function):
    """y = x W^T by each row's expert. The weights follow x where their gradients go to autograd.

    Keeps x for backward. Every weight gets a gradient, of zeros without rows: reductions wait for all of them.
    """

    @staticmethod
    def forward(ctx: Any, call: GroupedCall, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(x)
        return call.product.forward(x, _values(call), call.groups)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        call, (x,), dy = ctx.call, ctx.saved_tensors, gradient.contiguous()
        of_input, *of_weights = ctx.needs_input_grad[1:]
        dx = call.product.input_gradient(dy, _values(call), call.groups) if of_input else None
        half = partial(_weight_half, call)
        if call.elsewhere is not None:
            call.elsewhere(half, dy, x.detach())
            return None, dx
        found = half(dy, x) if any(of_weights) else [None] * len(of_weights)
        return None, dx, *found


def _values(call: GroupedCall) -> list[Tensor]:
    return [weight.detach() for weight in call.weights]


def _weight_half(call: GroupedCall, dy: Tensor, x: Tensor) -> Sequence[Tensor]:
    return call.product.weight_gradients(dy, x, call.groups)


def grouped_linear(call: GroupedCall, x: Tensor) -> Tensor:
    """Return y [T, n] of x [T, k], rows of one expert after the other."""
    assert sum(call.groups.sizes) == len(x), f"{len(x)} rows are not the {sum(call.groups.sizes)} of the experts"
    result: Tensor = GroupedLinear.apply(call, x.contiguous(), *(() if call.elsewhere else call.weights))
    return result
