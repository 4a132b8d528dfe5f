"""Dense attention of a whole sequence by autograd, the reference for every sharded algorithm."""

from typing import NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    """One attention: inputs [S b h d], [S b g d] and [S b g dv], the gradient of the output, and the mask."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    causal: bool
    window: tuple[int | None, int | None] | None = None
    packed: Tensor | None = None
    """The pairs that packed documents leave, [S S], in place of causal and window."""


def problem(
    tokens: int,
    heads: int,
    kv_heads: int,
    *,
    causal: bool,
    dim: int = 8,
    batch: int = 2,
    seed: int = 0,
    value_dim: int | None = None,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    dims = (dim, dim, value_dim or dim, value_dim or dim)
    shapes = [(tokens, batch, n, d) for n, d in zip((heads, kv_heads, kv_heads, heads), dims, strict=True)]
    return Problem(*(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes), causal)


def dense(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, dq, dk, dv in float64."""
    q, k, v = (x.detach().double().requires_grad_() for x in problem[:3])
    group = q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("sbhd,tbhd->bhst", q, keys) * q.shape[-1] ** -0.5
    masked = hidden(problem)
    # a query without a key has no result
    blind = masked.all(-1, keepdim=True)
    weights = scores.masked_fill(masked & ~blind, -torch.inf).softmax(-1).masked_fill(blind, 0)
    out = torch.einsum("bhst,tbhd->sbhd", weights, values)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), problem.dout.double())


def hidden(problem: Problem) -> Tensor:
    """The pairs that the mask hides, [S S]."""
    if problem.packed is not None:
        return ~problem.packed
    tokens = problem.q.shape[0]
    left, right = problem.window or (None, None)
    distance = torch.arange(tokens)[None] - torch.arange(tokens)[:, None]
    right = 0 if problem.causal else right
    return (distance < -(tokens if left is None else left)) | (distance > (tokens if right is None else right))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest deviation over largest value."""
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()
