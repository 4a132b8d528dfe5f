"""Attention over a sequence sharded on ranks, through any backend."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from megatron_cp.context import keep, opaque, transforms
from megatron_cp.context.agreement import refused_by_all, wants_gradients
from megatron_cp.context.cross import evened, is_cross
from megatron_cp.context.documents import Documents
from megatron_cp.context.dropout import DropoutSeed, as_seed
from megatron_cp.context.function import run, run_kept
from megatron_cp.context.inputs import as_number, as_sink
from megatron_cp.context.plan import Plan, Sizes, check_plan, plan
from megatron_cp.context.prepare import documents_of, host_waits, prepare
from megatron_cp.errors import Refused

__all__ = ["Plan", "Sizes", "attend", "plan"]


def attend(
    q: Float[Tensor, "s b h d"],
    k: Float[Tensor, "t b g d"],
    v: Float[Tensor, "t b g dv"],
    plan: Plan,
    *,
    sink: Float[Tensor, "*b h"] | float | None = None,
    documents: Documents | Tensor | Sequence[int] | None = None,
    agreed: bool = False,
    dropout_seed: DropoutSeed | Tensor | int | None = None,
) -> Float[Tensor, "s b h dv"]:
    """Attend this rank's queries to the whole sequence, differentiably; all ranks of the plan call it together.

    Computes in the dtype of q, k and v, under autocast too; has first derivatives only. Under torch.compile and
    torch.func it is one operator, which neither looks into.

    `sink` is one more logit for each query head, beside the scaled scores, that takes a share of the softmax and has no
    value: 0 is the off-by-one softmax, a tensor [h], or [b h] for sinks of each sequence, may be learned. Its gradient
    is this rank's part: the ranks of the plan share the sink, whose gradient is the sum of their parts.

    Cross-attention is a call with other numbers of keys than of queries, the same on all ranks, by a plan with
    causal=False: each query sees all keys.

    `documents` are those of a packed sequence, which see their own tokens only: `Documents`, made once for all layers
    of a microbatch, or their ends as flash-attn's cu_seqlens, from 0 to S, in a list or on the CPU or the device of q,
    where every call waits to read them. All rows of the batch have the same ones.

    `dropout_seed` drops attention weights at the plan's rate: the same ones for one seed, whatever the algorithm, the
    layout and the ranks are. Each query's rank says which it drops, so that ranks with different seeds agree, too; all
    give one, or none, as for an evaluation. Neither torch.compile nor torch.func take one.

    Every call first compares shapes, dtypes and plans of all ranks, in one all-gather of 8 bytes per rank. With
    `agreed` the caller guarantees that they are equal: a GPU, whose host would wait for the comparison, sends the
    algorithm's messages only. Megatron cuts every batch for its ranks by one rule, so that its layers ask for the
    comparison at their first call and after a change of their own shapes.

    Raises ValueError on every rank when these differ between ranks, and when tensors do not fit each other or the
    algorithm; nothing but the comparison is sent before.
    """
    check_plan(plan)
    if dropout_seed is not None and (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()):
        raise Refused("attention drops no weights under torch.compile and torch.func; leave it out of them, or dropout")
    number = as_number(sink)
    if torch.compiler.is_compiling():
        return opaque.attend(q, k, v, as_sink(sink, q), plan, documents_of(documents, q), agreed, number)
    transformed = torch._C._are_functorch_transforms_active()
    if not transformed and (kept := keep.take()):
        if not is_cross(q, k):
            return run_kept(q, k, v, kept, as_sink(sink, q))
        longer = evened(q, k, v, plan, documents=False, drops=False)[:3]
        return run_kept(*longer, kept, as_sink(sink, q))[: q.shape[0]]
    with refused_by_all(plan, q, k, v, agreed=agreed and host_waits(q)):
        logits, packed = as_sink(sink, q), documents_of(documents, q)
        seed = as_seed(dropout_seed, plan.dropout, q)
        queries = q.shape[0] if is_cross(q, k) else None
        if queries is not None:
            q, k, v, packed = evened(q, k, v, plan, documents=packed is not None, drops=seed is not None)
    if transformed:
        out = transforms.attend(q, k, v, logits, plan, packed, agreed, number)
        return out if queries is None else out[:queries]
    gradients = wants_gradients(q, k, v, logits)
    drops = seed is not None
    settled = prepare(
        q, k, v, plan, packed, agreed=agreed, gradients=gradients, sink=logits, number=number, drops=drops
    )
    out = run(q, k, v, settled, logits, packed, seed)
    return out if queries is None else out[:queries]
