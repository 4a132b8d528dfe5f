"""Preparation of a call before its first message: agreement of all ranks, and the choice of backend `auto`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_cp.context.agreement import agree, refused_by_all
from megatron_cp.context.alibi import check_alibi
from megatron_cp.context.auto import choices, settle
from megatron_cp.context.checks import check_documents, check_dropout, check_mask, check_sinks
from megatron_cp.context.document_choice import settle_layout
from megatron_cp.context.documents import Documents, documents
from megatron_cp.context.inputs import check_inputs, check_sink
from megatron_cp.context.plan import Plan, Sizes
from megatron_cp.errors import Refused


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    packed: Documents | None = None,
    *,
    agreed: bool,
    gradients: bool,
    sink: object = None,
    number: float | None = None,
    drops: bool = False,
    others: Sequence[object] = (),
    tokens: int | None = None,
) -> Plan:
    """Return the settled plan for such tensors; raises ValueError on every rank when they do not fit together.

    packed:    the documents of the sequence
    agreed:    the caller guarantees that ranks are equal; a GPU's host does not wait for the comparison
    gradients: a backward pass may follow
    number:    the sink of all heads, where the caller gave a number
    drops:     some weights are dropped
    others:    what else must be equal on all ranks
    tokens:    for which `auto` chooses, if not those of this call on all ranks
    """
    tensors, agreed = (q, k, v, *([] if sink is None else [sink])), agreed and host_waits(q)
    with refused_by_all(plan, *tensors, agreed=agreed):
        check_inputs(q, k, v)
        if packed is not None:
            check_documents(packed, q.shape[0] * plan.cp.size, plan.cp.size)
            check_mask(plan.backend, packed.mask(plan.mask))
        if sink is not None:
            check_sink(sink, q)
        if plan.alibi is not None:
            check_alibi(plan.alibi, q)
        dtype, dim = str(q.dtype).removeprefix("torch."), max(q.shape[3], v.shape[3])
        sizes = Sizes(tokens or q.shape[0] * plan.cp.size, q.shape[2], k.shape[2], dim, dtype, q.device.type)
        chosen_by = () if agreed else choices(plan, sizes)
    if not agreed:
        asked = (f"sink={number}", *(["dropout_seed given"] if drops else []), *chosen_by, *others)
        agree(plan, *tensors, packed=packed, gradients=gradients, choices=asked)
    settled = settle_layout(settle(plan, sizes), sizes, packed)
    if sink is not None:
        check_sinks(settled.backend)
    if drops:
        check_dropout(settled.backend)
    return settled


def documents_of(given: Documents | Tensor | Sequence[int] | None, q: object) -> Documents | None:
    """Return the documents that a call was given; raises ValueError for ends that are none, or on another device."""
    if given is None or isinstance(given, Documents):
        return given
    if isinstance(given, Tensor) and isinstance(q, Tensor) and given.device not in (torch.device("cpu"), q.device):
        raise Refused(
            f"cu_seqlens must be on the CPU or the device of q, {q.device}, got {given.device}; "
            "read them once for all layers: documents(cu_seqlens)"
        )
    return documents(given)


def host_waits(q: object) -> bool:
    """True if the host would wait for the comparison of calls, which a caller's guarantee then spares."""
    return isinstance(q, Tensor) and q.device.type != "cpu"
