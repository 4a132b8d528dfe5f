"""The autograd function around every backend's loop, and its two passes."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import wraps
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from megatron_cp.context import keep, sinks
from megatron_cp.context.algorithms import latent as latent_ring
from megatron_cp.context.algorithms.latent import Widths
from megatron_cp.context.alibi import with_positions
from megatron_cp.context.documents import Documents
from megatron_cp.context.dropout import DropoutSeed, labelled
from megatron_cp.context.layouts import Layout
from megatron_cp.context.loop import Loop
from megatron_cp.context.packing import with_dim
from megatron_cp.context.partials import accumulator_dtype
from megatron_cp.context.plan import Plan, layouts_for, task_for
from megatron_cp.context.relayout import relayout
from megatron_cp.context.task import Task
from megatron_cp.errors import Refused
from megatron_cp.kernels import with_dropout
from megatron_cp.kernels.protocol import PreparesBackward

SMALLEST_SCALE = torch.finfo(torch.float32).tiny


class AttentionCall(NamedTuple):
    """One attention between two re-layouts.

    layout: positions that the caller's tokens have
    head_dim: of queries and keys
    factor: of the queries, so that the scale of the task is a positive float32, as fused kernels want it
    merges_sink: the loop merges a sink itself
    seed: of dropped weights; None drops none
    alibi: the slope of each query head; None leaves scores as they are
    of_tokens: how many of q, k and v are tensors of tokens, which move where the loop wants other positions
    """

    loop: Loop[Any]
    task: Task
    layout: Layout
    head_dim: int
    factor: float
    merges_sink: bool
    seed: DropoutSeed | None = None
    alibi: tuple[float, ...] | None = None
    of_tokens: int = 3


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    sink: Tensor | None = None,
    packed: Documents | None = None,
    seed: DropoutSeed | None = None,
) -> Tensor:
    """Attend by a plan whose backend is chosen; the caller guarantees that all ranks hold tensors of one shape."""
    return run_call(q, k, v, sink, call_for(q, k, v, plan, packed, seed))


def run_latent(
    q: Tensor, latent: Tensor, up: Tensor, plan: Plan, sink: Tensor | None = None, packed: Documents | None = None
) -> Tensor:
    """Attend to what `up` [h e r] expands from latents s b 1 (r p), by a settled plan; as `run` otherwise."""
    call = call_for(q, q, with_dim(q, Widths.of(q, latent, up).value), plan, packed)
    # the weight has no tokens, and no columns are added to queries and latents
    widest = max(q.shape[3], latent.shape[3])
    return run_call(q, latent, up, sink, call._replace(loop=latent_ring, of_tokens=2, head_dim=widest))


def run_call(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, call: AttentionCall, kept: keep.KeptCall | None = None
) -> Tensor:
    """Return the result of a call; what the forward of a checkpoint has kept of it where there is `kept`."""
    return _Attend.apply(q, k, v, sink, call, kept)


def run_kept(q: Tensor, k: Tensor, v: Tensor, kept: keep.KeptCall, sink: Tensor | None) -> Tensor:
    """Return what the forward of a checkpoint kept of this call, differentiably by q, k and v; nothing is sent."""
    return run_call(q, k, v, sink, kept.call, kept)


def call_for(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, packed: Documents | None = None, seed: DropoutSeed | None = None
) -> AttentionCall:
    """Return the call of a settled plan for such tensors; raises ValueError when they do not fit."""
    layout, _ = layouts_for(plan, q.shape[0] * plan.cp.size, packed)
    task = task_for(q, k, v, plan, packed)
    factor, scale = _positive(task.scale)
    inside = plan.chunks is not None or plan.backend.capabilities.sinks == "inside"
    kernel = task.kernel if seed is None else with_dropout(task.kernel, plan.dropout)
    task = replace(task, scale=scale, kernel=kernel)
    return AttentionCall(plan.loop, task, layout, q.shape[3], factor, inside, seed, plan.alibi)


def forward_pass(
    q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, sink: Tensor | None = None
) -> tuple[Tensor, Any]:
    """Return out and what the loop keeps for the backward pass; computes in the dtype of the inputs."""
    if not q.shape[1]:
        return q.new_empty((*q.shape[:3], v.shape[3])), ()
    with without_autocast(q.device):
        q = q if call.factor == 1 else q * call.factor
        mine = call.layout[call.task.fabric.rank]
        if call.alibi is not None:
            q, k = with_positions(q, k, mine, call.alibi, call.task.scale)
        if call.seed is not None:
            q, k = labelled(q, k, mine, call.seed)
        q, k, v = _moved([last_dim_contiguous(x) for x in (q, k, v)], call, call.layout, call.task.layout)
        task = _with_sink(call.task, sink, q)
        out, saved = call.loop.forward(q, k, v, task)
        if task.sink is not None and not call.merges_sink:
            out, lse = sinks.merged(saved.out, saved.lse, task.sink)
            saved = saved._replace(out=out, lse=lse)
        return relayout([out], task.layout, call.layout, task.fabric)[0], saved


def backward_pass(dout: Tensor, saved: Any, call: AttentionCall, sink: Tensor | None = None) -> tuple[Tensor, ...]:
    """Return dq, dk and dv, and with a sink its gradient, of which every rank has a part."""
    if not dout.shape[1]:
        (heads, kv_heads), dim = call.task.heads, call.head_dim
        dsink = [] if sink is None else [torch.zeros_like(sink)]
        shapes = (heads, dim), (kv_heads, dim), (kv_heads, dout.shape[3])
        return *(dout.new_empty((*dout.shape[:2], *shape)) for shape in shapes), *dsink
    with without_autocast(dout.device):
        task = _with_sink(call.task, sink, dout)
        if isinstance(task.kernel, PreparesBackward):
            task = task.on(task.fabric, task.layout, task.kernel.for_backward())
        (dout,) = relayout([last_dim_contiguous(dout)], call.layout, task.layout, task.fabric)
        dq, dk, dv, *dsink = call.loop.backward(dout, saved, task)
        if task.sink is not None and not call.merges_sink:
            dsink = [sinks.gradient(dout, saved.out, saved.lse, task.sink)]
        dq = dq if call.factor == 1 else dq * call.factor
        dq, dk, dv = _moved([dq, dk, dv], call, task.layout, call.layout)
        # without columns that are no part of q and k
        dq, dk = dq[..., : call.head_dim], dk[..., : call.head_dim]
        return dq, dk, dv, *(part.to(sink.dtype) for part in dsink if sink is not None)


def _moved(tensors: list[Tensor], call: AttentionCall, before: Layout, after: Layout) -> list[Tensor]:
    count = call.of_tokens
    return relayout(tensors[:count], before, after, call.task.fabric) + tensors[count:]


def _with_sink(task: Task, sink: Tensor | None, like: Tensor) -> Task:
    return task if sink is None else replace(task, sink=sink.to(accumulator_dtype(like)))


def differentiable_once(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., Any]:
    """Wrap the backward pass of an autograd function so that it raises ValueError where its results shall have a graph.

    torch's `once_differentiable` gives constants where the gradient of the output is one, as in out.sum().
    """

    @wraps(backward)
    def wrapper(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
        if any(torch._C._functorch.is_legacy_batchedtensor(dout) for dout in douts):
            raise Refused(
                "attention has one gradient of its output at a time, got a batch of them (is_grads_batched, "
                "vectorize=True); take one after the other, or torch.func.jacrev"
            )
        if torch.is_grad_enabled():
            refuse_derivative("a gradient of its gradients (create_graph=True)")
        return backward(ctx, *douts)

    return wrapper


def refuse_transforms(name: str) -> None:
    """Raise Refused under a transform of torch.func, for which attention `name` has no rule."""
    if torch._C._are_functorch_transforms_active():
        raise Refused(
            f"{name} has no rule for torch.func, got a call under one of its transforms; use torch.autograd around it"
        )


def refuse_derivative(got: str) -> NoReturn:
    """Raise Refused for a derivative that attention lacks."""
    raise Refused(
        f"attention has first derivatives in reverse mode only, got {got}; "
        "use torch's scaled_dot_product_attention with its math backend on one rank for others"
    )


class _Attend(torch.autograd.Function):
    """A backend's loop, between two re-layouts if it needs other positions than the tokens have."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        call: AttentionCall,
        kept: keep.KeptCall | None,
    ) -> Tensor:
        out, saved = kept.results((q, k, v)) if kept else forward_pass(q, k, v, call, sink)
        # autograd keeps a flat list of tensors, the loop gets back the tuple that it made of them
        tensors, ctx.saved_as = tree_flatten(saved)
        result = as_no_view(out, tensors)
        ctx.save_for_backward(sink, *(result if tensor is out else tensor for tensor in tensors))
        ctx.call = call
        if not kept:
            keep.keep(call, result, saved, (q, k, v))
        return result

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        sink, *saved = ctx.saved_tensors
        dq, dk, dv, *dsink = backward_pass(dout, tree_unflatten(saved, ctx.saved_as), ctx.call, sink)
        return dq, dk, dv, dsink[0] if dsink else None, None, None

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        refuse_derivative("a derivative in forward mode")


def as_no_view(out: Tensor, saved: list[Tensor]) -> Tensor:
    """Return `out` as a tensor that may be changed in place, which autograd forbids for views made in a function."""
    if not out._is_view():
        return out
    # a change would go unseen in another tensor on the same memory
    if any(x is not out and x.untyped_storage()._cdata == out.untyped_storage()._cdata for x in saved):
        return out.clone()
    return torch.ops.aten._unsafe_view(out, out.shape)


def _positive(scale: float) -> tuple[float, float]:
    """Split a scale into a factor of the queries and a positive scale."""
    if abs(scale) < SMALLEST_SCALE:
        return scale, 1.0
    return (1.0, scale) if scale > 0 else (-1.0, -scale)


def last_dim_contiguous(x: Tensor) -> Tensor:
    # a dim of size 1 may have any stride, which `contiguous` leaves as it is
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Compute in the dtypes of tensors, whatever the caller's autocast is."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
