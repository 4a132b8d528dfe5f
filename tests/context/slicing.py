"""One rank's forward and backward over the slices of a sequence, for recordings of what it does."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch

from megatron_cp.context.plan import Plan
from megatron_cp.context.slices import KeptKeys, attend_slice
from megatron_cp.context.trace.events import Problem


def run_slices(problem: Problem, plan: Plan, lengths: Sequence[int], device: str) -> None:
    """Attend slice after slice, then run their backward passes in the reverse order.

    lengths: tokens of the slices over all ranks
    """
    kept = KeptKeys(tuple(range(*ends) for ends in pairwise(accumulate(lengths, initial=0))))
    made = []
    for number, tokens in enumerate(kept.tokens):
        q, k, v = (
            torch.empty(len(tokens) // problem.ranks, 1, heads, problem.head_dim, dtype=torch.bfloat16, device=device)
            for heads in (problem.heads, problem.kv_heads, problem.kv_heads)
        )
        leaves = [x.requires_grad_() for x in (q, k, v)]
        made.append(attend_slice(*leaves, plan, kept, number, agreed=True))
    for out in reversed(made):
        out.backward(torch.empty_like(out))
    assert not kept.slices
