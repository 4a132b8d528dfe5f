"""Attention under the transforms of torch.func: `grad`, `vjp` and `vmap`, in any order."""

from typing import Any

import torch
from torch import Tensor

from megatron_cp.context import opaque
from megatron_cp.context.agreement import wants_gradients
from megatron_cp.context.documents import Documents
from megatron_cp.context.function import refuse_derivative
from megatron_cp.context.plan import Plan

type Dims = tuple[int | None, ...]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    plan: Plan,
    packed: Documents | None,
    agreed: bool,
    number: float | None,
) -> Tensor:
    """Attend under transforms; `number` is the sink of all heads, where the caller gave a number."""
    numbers = plan.number, opaque.number_of(packed)
    out, _ = _Forward.apply(q, k, v, sink, *numbers, agreed, wants_gradients(q, k, v, sink), number)
    return out


class _Forward(torch.autograd.Function):
    """The operator with its derivative and its rule for `vmap`, which takes the mapped dim into the batch."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        return opaque.forward(q, k, v, sink, *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        out, ticket = output
        ctx.mark_non_differentiable(ticket)
        ctx.save_for_backward(ticket, *inputs[:3], out, inputs[3])

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        dq, dk, dv, dsink = _Backward.apply(dout, *ctx.saved_tensors)
        return dq, dk, dv, None if ctx.saved_tensors[-1] is None else dsink, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        refuse_derivative("a derivative in forward mode")

    @staticmethod
    def vmap(
        info: Any, in_dims: Dims, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, *rest: Any
    ) -> tuple[Any, Any]:
        folded = [_fold(x, dim, info.batch_size) for x, dim in zip((q, k, v), in_dims, strict=False)]
        sink = _fold_sink(sink, in_dims[3], info.batch_size, folded[0])
        out, ticket = _Forward.apply(*folded, sink, *rest)
        return (_unfold(out, info.batch_size), ticket), (1, None)


class _Backward(torch.autograd.Function):
    """The derivative of the operator, which has none itself."""

    @staticmethod
    def forward(dout: Tensor, ticket: Tensor, *given: Any) -> tuple[Tensor, ...]:
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
    def vmap(info: Any, in_dims: Dims, dout: Tensor, ticket: Tensor, *given: Any) -> tuple[Any, Any]:
        *tensors, sink = given
        *dims, sink_dim = in_dims[2:]
        if dims[-1] is None:
            # one forward pass, differentiated several times
            several = [_Backward.apply(row, ticket, *given) for row in dout.movedim(in_dims[0] or 0, 0)]
            return tuple(torch.stack(grads, 1) for grads in zip(*several, strict=True)), (1, 1, 1, 1)
        size = info.batch_size
        dout, *tensors = (_fold(x, dim, size) for x, dim in zip((dout, *tensors), (in_dims[0], *dims), strict=True))
        *grads, dsink = _Backward.apply(dout, ticket, *tensors, _fold_sink(sink, sink_dim, size, dout))
        if sink is not None:
            # (n b) h -> n b h, and n h for a sink of all sequences
            each = dsink.unflatten(0, (size, -1))
            dsink = each if sink.ndim - (sink_dim is not None) == 2 else each.sum(1)
        return (*(_unfold(x, size) for x in grads), dsink), (1, 1, 1, None if sink is None else 0)


def _fold(x: Tensor, dim: int | None, size: int) -> Tensor:
    # … n …, s b h d -> s (n b) h d
    stacked = x.movedim(dim, 1) if dim is not None else x.unsqueeze(1).expand(-1, size, -1, -1, -1)
    return stacked.flatten(1, 2)


def _fold_sink(sink: Tensor | None, dim: int | None, size: int, folded: Tensor) -> Tensor | None:
    if sink is None:
        return None
    # … n …, h or b h -> (n b) h
    stacked = sink.movedim(dim, 0) if dim is not None else sink.expand(size, *sink.shape)
    each = stacked if stacked.ndim == 3 else stacked[:, None].expand(-1, folded.shape[1] // size, -1)
    return each.flatten(0, 1)


def _unfold(x: Tensor, size: int) -> Tensor:
    # s (n b) h d -> s n b h d
    return x.unflatten(1, (size, -1))
