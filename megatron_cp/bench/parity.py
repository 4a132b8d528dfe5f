"""Compare one backend with attention on one rank, in this process."""

import torch
from torch import Tensor

from megatron_cp.comm import LocalFabric, axes_of, in_process
from megatron_cp.context import BACKENDS
from megatron_cp.context.attend import attend, plan
from megatron_cp.context.layouts import ZIGZAG, indices
from megatron_cp.grid import Grid


def deviation(backend: str, ranks: int, tokens: int = 96) -> float:
    """Return the largest deviation of out, dq, dk, dv in float64, over the largest value.

    The mask is causal, with two query heads per KV head.
    """
    generator = torch.Generator().manual_seed(0)
    heads = 2 * ranks
    q, k, v, dout = (
        torch.randn(tokens, 1, count, 8, generator=generator, dtype=torch.float64)
        for count in (heads, ranks, ranks, heads)
    )

    def body(fabric: LocalFabric) -> list[Tensor]:
        on_grid = BACKENDS.get(backend).needs_grid
        inner, outer = axes_of(Grid(fabric.size, 1), fabric) if on_grid else (None, None)
        chosen = plan(backend, cp=fabric, inner=inner, outer=outer, kernel="reference")
        mine = torch.tensor(indices(ZIGZAG, tokens, fabric.size, fabric.rank))
        mine_q, mine_k, mine_v = (x[mine].requires_grad_() for x in (q, k, v))
        out = attend(mine_q, mine_k, mine_v, chosen)
        return [out.detach(), *torch.autograd.grad(out, (mine_q, mine_k, mine_v), dout[mine])]

    # one rank holds its tokens in sequence order
    (alone,) = in_process(1, body)
    errors = []
    for rank, parts in enumerate(in_process(ranks, body)):
        mine = torch.tensor(indices(ZIGZAG, tokens, ranks, rank))
        errors += [((x - y[mine]).abs().max() / y.abs().max()).item() for x, y in zip(parts, alone, strict=True)]
    return max(errors)
