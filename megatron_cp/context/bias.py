"""Attention with a dense additive bias, and attention probabilities, which need whole rows of scores.

Source: Li et al. 2021, arXiv:2105.13120, section 3.2 (Ring Self-Attention).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from megatron_cp.context.agreement import agree, refused_by_all, wants_gradients
from megatron_cp.context.algorithms import rsa
from megatron_cp.context.checks import able, check_documents
from megatron_cp.context.document_layouts import STREAM
from megatron_cp.context.documents import Documents
from megatron_cp.context.function import (
    as_no_view,
    differentiable_once,
    refuse_derivative,
    refuse_transforms,
    without_autocast,
)
from megatron_cp.context.inputs import DTYPES, check_dense, check_inputs
from megatron_cp.context.plan import Plan, check_plan, task_for
from megatron_cp.context.prepare import documents_of
from megatron_cp.context.task import Saved, Task
from megatron_cp.dtypes import BYTES
from megatron_cp.errors import Refused


@torch.compiler.disable(reason="attention with whole rows of scores is not compiled")
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
    task = _rsa_task(q, k, k, plan, bias, documents, gradients=False)
    with torch.no_grad(), without_autocast(q.device):
        scores = rsa.score_rows(q, k, bias, task)
        weights = rsa.whole_rows(scores, scores.logsumexp(-1)).flatten(1, 2)
        return torch.empty_like(weights).index_copy_(-1, rsa.columns_of(task, q), weights)


@torch.compiler.disable(reason="attention with whole rows of scores is not compiled")
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
    gradients = wants_gradients(q, k, v, bias)
    return _Biased.apply(q, k, v, bias, _rsa_task(q, k, v, plan, bias, documents, gradients))


class _Biased(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, task: Task) -> Tensor:
        with without_autocast(q.device):
            out, saved = rsa.forward_with_bias(q, k, v, bias, task)
        result = as_no_view(out, list(saved))
        ctx.save_for_backward(*(result if tensor is out else tensor for tensor in saved), bias)
        ctx.task = task
        return result

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        *saved, bias = ctx.saved_tensors
        with without_autocast(dout.device):
            return *rsa.backward_with_bias(dout, Saved(*saved), bias, ctx.task), None

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        refuse_derivative("a derivative in forward mode")


def _rsa_task(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    bias: Tensor | None,
    given: Documents | Tensor | Sequence[int] | None,
    gradients: bool,
) -> Task:
    """Return the task of such tensors; refuse another backend, different shapes and a bias that does not fit."""
    check_plan(plan)
    tensors = (q, k, v, *([] if bias is None else [bias]))
    with refused_by_all(plan, *tensors):
        refuse_transforms("whole rows of scores")
        if not plan.backend.capabilities.bias or plan.chunks is not None:
            names = able(lambda entry: entry.capabilities.bias)
            raise Refused(
                f"whole rows of scores are held by backend {names} without chunks only, got {plan.backend.name!r} with "
                f"chunks = {plan.chunks}; make the plan with plan({names}, ...)"
            )
        if plan.alibi is not None:
            raise Refused("a bias is added to scores, and alibi is one; leave alibi out and add it to the bias")
        check_inputs(q, k, v)
        packed = documents_of(given, q)
        if packed is not None:
            check_documents(packed, q.shape[0] * plan.cp.size, plan.cp.size)
        if bias is not None:
            _check_bias(bias, q, q.shape[0] * plan.cp.size)
    agree(plan, *tensors, packed=packed, gradients=gradients)
    # a bias has its rows where the tokens are
    return task_for(q, k, v, replace(plan, document_layout=STREAM), packed)


def _check_bias(bias: object, q: Tensor, tokens: int) -> None:
    if not isinstance(bias, Tensor):
        raise Refused(f"bias must be a tensor b h s S that is added to the scores, got {type(bias).__name__}")
    check_dense("bias", bias, "b h s S")
    if bias.dtype not in DTYPES:
        raise Refused(
            f"bias must be of dtype {' or '.join(BYTES)}, got {bias.dtype}; it is added to the scores: for a mask give "
            "-inf where a query does not see a key, and 0 elsewhere"
        )
    if bias.device != q.device:
        raise Refused(f"bias must be on the device of q, got {bias.device} and {q.device}; move it")
    whole = (q.shape[1], q.shape[2], q.shape[0], tokens)
    if bias.ndim != 4 or any(a not in (1, b) for a, b in zip(bias.shape, whole, strict=True)):
        raise Refused(f"bias must be b h s S = {whole}, or 1 where it is broadcast, got {tuple(bias.shape)}")
