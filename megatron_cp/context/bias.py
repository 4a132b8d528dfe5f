"""Attention with a dense additive bias, and attention probabilities, which need whole rows of scores.

Source: Li et al. 2021, arXiv:2105.13120, section 3.2 (Ring Self-Attention).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from megatron_cp.context.agreement import agree, wants_gradients
from megatron_cp.context.algorithms import rsa
from megatron_cp.context.checks import able, check_documents
from megatron_cp.context.document_layouts import STREAM
from megatron_cp.context.documents import Documents
from megatron_cp.context.function import differentiable_once, without_autocast
from megatron_cp.context.inputs import check_inputs
from megatron_cp.context.plan import Plan, task_for
from megatron_cp.context.prepare import documents_of
from megatron_cp.context.task import Saved, Task
from megatron_cp.errors import Refused


def attention_probabilities(
    q: Float[Tensor, "s b h d"],
    k: Float[Tensor, "s b g d"],
    plan: Plan,
    bias: Tensor | None = None,
    *,
    documents: Documents | Tensor | Sequence[int] | None = None,
) -> Float[Tensor, "b h s S"]:
    """Return the weight of every key of the sequence for each of this rank's queries; all ranks call it together.

    Rows are in local order, columns in sequence order; masked keys get 0. In float32 (float64 for float64), without
    gradient. `plan` is of backend "rsa", `bias` as in `attend_with_bias`, `documents` as in `attend`. Sends (p-1) U.
    Raises ValueError for another plan, and when shapes differ between ranks or do not fit; nothing but their comparison
    is sent before.
    """
    with torch.no_grad(), without_autocast(q.device):
        task = _rsa_task(q, k, k, plan, bias, documents_of(documents, q))
        scores = rsa.score_rows(q, k, bias, task)
        weights = rsa.whole_rows(scores, scores.logsumexp(-1)).flatten(1, 2)
        return torch.empty_like(weights).index_copy_(-1, rsa.columns_of(task, q), weights)


def attend_with_bias(
    q: Float[Tensor, "s b h d"],
    k: Float[Tensor, "s b g d"],
    v: Float[Tensor, "s b g d"],
    bias: Tensor,
    plan: Plan,
    *,
    documents: Documents | Tensor | Sequence[int] | None = None,
) -> Float[Tensor, "s b h d"]:
    """Attend with `bias` added to the scaled scores, differentiable in q, k, v and bias; all ranks call it together.

    `bias` [b h s S] belongs to this rank's queries in local order (s) and all keys in sequence order (S); dims of
    size 1 are broadcast. Its gradient is of this rank's queries only: a bias that ranks share needs their sum.
    `plan` is of backend "rsa", `documents` as in `attend`. Raises ValueError for another plan, and when shapes differ
    between ranks or do not fit; nothing but their comparison is sent before.
    """
    return _Biased.apply(q, k, v, bias, _rsa_task(q, k, v, plan, bias, documents_of(documents, q)))


class _Biased(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, task: Task) -> Tensor:
        with without_autocast(q.device):
            out, saved = rsa.forward_with_bias(q, k, v, bias, task)
        ctx.save_for_backward(*saved, bias)
        ctx.task = task
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        *saved, bias = ctx.saved_tensors
        with without_autocast(dout.device):
            return *rsa.backward_with_bias(dout, Saved(*saved), bias, ctx.task), None


def _rsa_task(q: Tensor, k: Tensor, v: Tensor, plan: Plan, bias: Tensor | None, packed: Documents | None) -> Task:
    """Return the task of such tensors; refuse another backend, different shapes and a bias that does not fit."""
    if not plan.backend.capabilities.bias or plan.chunks is not None:
        names = able(lambda entry: entry.capabilities.bias)
        raise Refused(
            f"whole rows of scores are held by backend {names} without chunks only, got {plan.backend.name!r} with "
            f"chunks = {plan.chunks}; make the plan with plan({names}, ...)"
        )
    agree(plan, q, k, v, *([] if bias is None else [bias]), packed=packed, gradients=wants_gradients(q, k, v, bias))
    check_inputs(q, k, v)
    if packed is not None:
        check_documents(packed, q.shape[0] * plan.cp.size, plan.cp.size)
    # a bias has its rows where the tokens are
    task = task_for(q, k, v, replace(plan, document_layout=STREAM), packed)
    whole = (q.shape[1], q.shape[2], q.shape[0], rsa.tokens_of(task))
    if bias is not None and (bias.ndim != 4 or any(a not in (1, b) for a, b in zip(bias.shape, whole, strict=True))):
        raise Refused(f"bias must be b h s S = {whole}, or 1 where it is broadcast, got {tuple(bias.shape)}")
    return task
