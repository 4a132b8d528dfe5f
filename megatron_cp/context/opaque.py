"""Attention as one operator of torch's dispatcher, which torch.compile does not look into.

Graphs hold numbers and tensors only: the operator gets the number of a plan, and returns a ticket, a tensor with the
number of what else its backward pass needs. That lives as long as the memory of the ticket, which torch keeps and drops
as any saved tensor.
"""

from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from megatron_cp.context import documents
from megatron_cp.context.agreement import wants_gradients
from megatron_cp.context.documents import Documents
from megatron_cp.context.function import AttentionCall, backward_pass, call_for, forward_pass
from megatron_cp.context.plan import Plan, numbered
from megatron_cp.context.prepare import prepare
from megatron_cp.errors import Refused


class _SavedState(bytearray):
    """The memory of a ticket.

    saved: tensors of the loop; a number stands for one of the operator's own q, k, v and out, which the graph keeps
    """

    call: AttentionCall
    saved: list[Tensor | int]
    saved_as: TreeSpec


_numbers = count(1)
_kept: WeakValueDictionary[int, _SavedState] = WeakValueDictionary()


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
    """Attend as one operator; `number` is the sink of all heads, where the caller gave a number."""
    out, _ = forward(q, k, v, sink, plan.number, number_of(packed), agreed, wants_gradients(q, k, v, sink), number)
    return out


def number_of(packed: Documents | None) -> int:
    return 0 if packed is None else packed.number


@torch.library.custom_op(
    "megatron_cp::attend",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? sink, SymInt plan, SymInt packed, bool agreed, bool gradients,"
    " float? number) -> (Tensor, Tensor)",
)
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    plan: int,
    packed: int,
    agreed: bool,
    gradients: bool,
    number: float | None,
) -> tuple[Tensor, Tensor]:
    held = documents.numbered(packed)
    settled = prepare(q, k, v, numbered(plan), held, agreed=agreed, gradients=gradients, sink=sink, number=number)
    call = call_for(q, k, v, settled, held)
    out, saved = forward_pass(q, k, v, call, sink)
    out = out.contiguous()
    leaves, saved_as = tree_flatten(saved)
    kept, number = _SavedState(8), next(_numbers)
    kept.call, kept.saved, kept.saved_as = call, [_own(leaf, (q, k, v, out)) for leaf in leaves], saved_as
    _kept[number] = kept
    return out, torch.frombuffer(kept, dtype=torch.int64).fill_(number)


def _own(leaf: Tensor, given: tuple[Tensor, ...]) -> Tensor | int:
    """Return a tensor that no compiled graph writes to, or the position among those that the graph keeps."""
    for position, tensor in enumerate(given):
        if leaf is tensor:
            return position
    shared = any(leaf.untyped_storage()._cdata == tensor.untyped_storage()._cdata for tensor in given)
    return leaf.clone() if shared else leaf


@forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(1, dtype=torch.int64, device="cpu")


@torch.library.custom_op(
    "megatron_cp::attend_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor ticket, Tensor q, Tensor k, Tensor v, Tensor out, Tensor? sink) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def backward(
    dout: Tensor, ticket: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sink: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kept = _kept.get(int(ticket))
    if kept is None:
        raise Refused(
            "a hook on saved tensors copied what a compiled attention keeps for its backward pass, which lives with "
            "the original; leave the attention out of the compiled function, or the hook out"
        )
    given = (q, k, v, out)
    saved = tree_unflatten([given[leaf] if isinstance(leaf, int) else leaf for leaf in kept.saved], kept.saved_as)
    dq, dk, dv, *dsink = (x.contiguous() for x in backward_pass(dout, saved, kept.call, sink))
    # an operator returns tensors only
    return dq, dk, dv, dsink[0] if dsink else dq.new_empty(0)


@backward.register_fake
def _(
    dout: Tensor, ticket: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sink: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsink = q.new_empty(0) if sink is None else sink.new_empty(sink.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsink


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    out, ticket = output
    ctx.save_for_backward(ticket, *inputs[:3], out, inputs[3])


def _differentiate(ctx: Any, dout: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    dq, dk, dv, dsink = backward(dout, *ctx.saved_tensors)
    return dq, dk, dv, None if ctx.saved_tensors[-1] is None else dsink, None, None, None, None, None


forward.register_autograd(_differentiate, setup_context=_save)
