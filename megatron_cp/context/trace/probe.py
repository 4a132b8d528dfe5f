"""See every pair of a loop that computes attention without a kernel, by orthogonal token vectors.

No query has any score with any key, so that each row spreads evenly over what it sees. With values, keys, queries and
output gradients that are unit vectors of their own, each entry of the results is one pair's weight or its derivative:
a pair that is missing, doubled or hidden by the mask is seen by its place. Unit vectors are scaled by the head.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_cp.comm import LocalFabric, in_process
from megatron_cp.context.attend import attend
from megatron_cp.context.layouts import indices
from megatron_cp.context.trace.events import Problem
from megatron_cp.context.trace.record import plan_on


class Tokens(NamedTuple):
    """q, k, v and dout of the whole sequence, [S 1 h 2S] and [S 1 g 2S]."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


def probe(problem: Problem, visible: np.ndarray) -> str:
    """Describe the first error of the backend's out, dq, dk and dv on such tokens; empty if there is none."""
    tokens = _tokens(problem)
    expected = _expected(tokens, torch.from_numpy(visible).double(), problem.heads // problem.kv_heads)

    def body(fabric: LocalFabric) -> list[Tensor]:
        mine = torch.tensor(indices(problem.layout, problem.seq, problem.ranks, fabric.rank, problem.stripe))
        q, k, v = (x[mine].requires_grad_() for x in tokens[:3])
        out = attend(q, k, v, plan_on(problem, fabric, "reference"), documents=problem.documents)
        found = (out.detach(), *torch.autograd.grad(out, (q, k, v), tokens.dout[mine]))
        return [found_x - whole[mine] for found_x, whole in zip(found, expected, strict=True)]

    for rank, differences in enumerate(in_process(problem.ranks, body, problem.ranks_per_node)):
        mine = indices(problem.layout, problem.seq, problem.ranks, rank, problem.stripe)
        for name, difference in zip(("out", "dq", "dk", "dv"), differences, strict=True):
            # not <= : NaN is wrong too
            wrong = torch.nonzero(~(difference.abs() <= 1e-9))
            if len(wrong):
                token, _, head, other = wrong[0].tolist()
                pair = f"position {mine[token]} with position {other % problem.seq}"
                return f"{name} of {pair}, head {head}, is wrong, and {len(wrong) - 1} more entries"
    return ""


def _tokens(problem: Problem) -> Tokens:
    seq = problem.seq
    first, second = torch.eye(2 * seq, dtype=torch.float64).split(seq)

    def spread(vectors: Tensor, heads: int) -> Tensor:
        return vectors[:, None, None] * torch.arange(1.0, heads + 1, dtype=torch.float64)[:, None]

    heads, kv_heads = problem.heads, problem.kv_heads
    return Tokens(spread(second, heads), spread(first, kv_heads), spread(first, kv_heads), spread(first, heads))


def _expected(tokens: Tokens, visible: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, dq, dk, dv written out: all scores are 0, so that the weights are visible / visible.sum."""
    q, k, v, dout = tokens
    weights, scale, groups = visible / visible.sum(1, keepdim=True).clamp(min=1), q.shape[-1] ** -0.5, k.shape[2]
    wide_k, wide_v = (x.repeat_interleave(group, 2) for x in (k, v))
    out = torch.einsum("st,tbhd->sbhd", weights, wide_v)
    dweights = torch.einsum("sbhd,tbhd->bhst", dout, wide_v)
    dscores = weights * (dweights - (dweights * weights).sum(-1, keepdim=True)) * scale
    dq = torch.einsum("bhst,tbhd->sbhd", dscores, wide_k)
    dk = torch.einsum("bhst,sbhd->tbhd", dscores, q).unflatten(2, (groups, group)).sum(3)
    dv = torch.einsum("st,sbhd->tbhd", weights, dout).unflatten(2, (groups, group)).sum(3)
    return out, dq, dk, dv
