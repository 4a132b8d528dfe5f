"""Attention under the transforms of torch.func: `grad`, `vjp` and `vmap`, in any order."""

from typing import Any

import torch
from torch import Tensor

from megatron_cp.context import opaque
from megatron_cp.context.agreement import wants_gradients
from megatron_cp.context.function import refuse_derivative
from megatron_cp.context.plan import Plan

type Dims = tuple[int | None, ...]


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan, agreed: bool) -> Tensor:
    """Attend under transforms."""
    out, _ = _Forward.apply(q, k, v, plan.number, agreed, wants_gradients(q, k, v))
    return out


class _Forward(torch.autograd.Function):
    """The operator with its derivative and its rule for `vmap`, which takes the mapped dim into the batch."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, plan: int, agreed: bool, gradients: bool) -> tuple[Tensor, Tensor]:
        return opaque.forward(q, k, v, plan, agreed, gradients)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        out, ticket = output
        ctx.mark_non_differentiable(ticket)
        ctx.save_for_backward(ticket, *inputs[:3], out)

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        return *_Backward.apply(dout, *ctx.saved_tensors), None, None, None

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        refuse_derivative("a derivative in forward mode")

    @staticmethod
    def vmap(info: Any, in_dims: Dims, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Any, Any]:
        folded = [_fold(x, dim, info.batch_size) for x, dim in zip((q, k, v), in_dims, strict=False)]
        out, ticket = _Forward.apply(*folded, *rest)
        return (_unfold(out, info.batch_size), ticket), (1, None)


class _Backward(torch.autograd.Function):
    """The derivative of the operator, which has none itself."""

    @staticmethod
    def forward(dout: Tensor, ticket: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        return opaque.backward(dout, ticket, *given)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        refuse_derivative("a gradient of its gradients")

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        refuse_derivative("a gradient of its gradients")

    @staticmethod
    def vmap(info: Any, in_dims: Dims, dout: Tensor, ticket: Tensor, *given: Tensor) -> tuple[Any, Any]:
        if in_dims[-1] is None:
            # one forward pass, differentiated several times
            several = [_Backward.apply(row, ticket, *given) for row in dout.movedim(in_dims[0] or 0, 0)]
            return tuple(torch.stack(grads, 1) for grads in zip(*several, strict=True)), (1, 1, 1)
        size = info.batch_size
        dims = (in_dims[0], *in_dims[2:])
        folded = [_fold(x, dim, size) for x, dim in zip((dout, *given), dims, strict=True)]
        return tuple(_unfold(x, size) for x in _Backward.apply(folded[0], ticket, *folded[1:])), (1, 1, 1)


def _fold(x: Tensor, dim: int | None, size: int) -> Tensor:
    # … n …, s b h d -> s (n b) h d
    stacked = x.movedim(dim, 1) if dim is not None else x.unsqueeze(1).expand(-1, size, -1, -1, -1)
    return stacked.flatten(1, 2)


def _unfold(x: Tensor, size: int) -> Tensor:
    # s (n b) h d -> s n b h d
    return x.unflatten(1, (size, -1))
