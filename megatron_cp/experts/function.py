"""Autograd functions of a linear over all experts of a rank, whose weight gradients may be computed elsewhere."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_cp.experts.product import GroupedProduct, Groups

WeightHalf = Callable[[Tensor, Tensor], Sequence[Tensor]]
"""Returns the gradients of the weights from dy and x."""

Activate = Callable[[Tensor, Tensor], Tensor]
"""Returns the activation of rows, each times its probability; without randomness."""


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
        return None, dx, *_of_weights(call, dy, x, of_weights)


class ActivatedLinear(torch.autograd.Function):
    """y = f(x, probs) W^T by each row's expert, with an activation f whose output is computed again in backward.

    Keeps x and the probabilities, which f's own backward keeps anyway.
    """

    @staticmethod
    def forward(
        ctx: Any, call: GroupedCall, activation: Activate, x: Tensor, probs: Tensor, *weights: Tensor
    ) -> Tensor:
        ctx.call, ctx.activation = call, activation
        ctx.save_for_backward(x, probs)
        return call.product.forward(activation(x, probs).contiguous(), _values(call), call.groups)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        call, dy = ctx.call, gradient.contiguous()
        needed = ctx.needs_input_grad[2:4]
        given = [kept.detach().requires_grad_(need) for kept, need in zip(ctx.saved_tensors, needed, strict=True)]
        with torch.enable_grad():
            inner = ctx.activation(*given).contiguous()
        wanted = [each for each in given if each.requires_grad]
        found: list[Tensor] = []
        if wanted:
            d_inner = call.product.input_gradient(dy, _values(call), call.groups)
            found = list(torch.autograd.grad(inner, wanted, d_inner))
        of_weights = _of_weights(call, dy, inner, ctx.needs_input_grad[4:])
        return None, None, *(found.pop(0) if need else None for need in needed), *of_weights


def _values(call: GroupedCall) -> list[Tensor]:
    return [weight.detach() for weight in call.weights]


def _of_weights(call: GroupedCall, dy: Tensor, x: Tensor, needed: Sequence[bool]) -> Sequence[Tensor | None]:
    """Return the gradients for the weights that autograd was given; none where they are computed elsewhere."""
    half = partial(_weight_half, call)
    if call.elsewhere is not None:
        call.elsewhere(half, dy, x.detach())
        return ()
    return half(dy, x.detach()) if any(needed) else [None] * len(needed)


def _weight_half(call: GroupedCall, dy: Tensor, x: Tensor) -> Sequence[Tensor]:
    return call.product.weight_gradients(dy, x, call.groups)


def grouped_linear(call: GroupedCall, x: Tensor) -> Tensor:
    """Return y [T, n] of x [T, k], rows of one expert after the other."""
    _check(call, x)
    result: Tensor = GroupedLinear.apply(call, x.contiguous(), *_given(call))
    return result


def activated_linear(call: GroupedCall, activation: Activate, x: Tensor, probs: Tensor) -> Tensor:
    """Return y [T, n] of the activation [T, k] of x and probs [T], of which nothing is kept."""
    _check(call, x)
    result: Tensor = ActivatedLinear.apply(call, activation, x, probs, *_given(call))
    return result


def _check(call: GroupedCall, x: Tensor) -> None:
    assert sum(call.groups.sizes) == len(x), f"{len(x)} rows are not the {sum(call.groups.sizes)} of the experts"


def _given(call: GroupedCall) -> tuple[Tensor, ...]:
    return () if call.elsewhere else call.weights
