"""Comparison of a plan with dense attention on a small batch, by the kernel and on the device of a run."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_cp.comm import SingleFabric
from megatron_cp.context import BACKENDS, DEFAULT
from megatron_cp.context.attend import Plan, attend
from megatron_cp.context.layouts import CONTIGUOUS, indices
from megatron_cp.kernels import with_cap
from megatron_cp.kernels.reference import ReferenceKernel

LARGEST_ERROR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Deviation from the right result (over its largest value) up to which a backend counts as correct."""
TOKENS = 512
"""Tokens of the sequence, and at least `OF_A_RANK` for each rank."""
OF_A_RANK = 8
NAMES = ("out", "dq", "dk", "dv")


class CheckedHeads(NamedTuple):
    """The heads of a layer on this rank: of queries and of keys, with the dims of keys and of values."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int


class Deviation(NamedTuple):
    """The tensor of this rank that differs most from dense attention.

    error: largest deviation over largest value of the whole tensor, infinite for anything that is no number
    bound: what its dtype allows
    """

    tensor: str
    error: float
    bound: float

    @property
    def wrong(self) -> bool:
        """True if the deviation is more than rounding."""
        return not self.error <= self.bound


def deviation(
    plan: Plan, sizes: CheckedHeads, dtype: torch.dtype, device: torch.device, sink: float | None = None
) -> Deviation:
    """Return the largest deviation of this rank's part of a random batch; all ranks of a settled plan call it together.

    Dense attention is that of kernel `reference` over the whole sequence in float64. `Fabric.sent` is left as it was.
    """
    fabrics = [plan.cp, *((plan.axes.inner, plan.axes.outer) if plan.axes else ())]
    sent = [fabric.sent for fabric in fabrics]
    # equal pieces of whole stripes and chunks, on each half of a rank's tokens
    piece = 2 * plan.stripe * (plan.chunks or 1)
    share = max(OF_A_RANK, TOKENS // plan.cp.size)
    tokens = plan.cp.size * -(-share // piece) * piece
    whole = _inputs(tokens, sizes, dtype, device)
    kernel = with_cap(ReferenceKernel(), plan.softcap)
    alone = replace(
        plan,
        backend=BACKENDS.get(DEFAULT),
        cp=SingleFabric(),
        axes=None,
        kernel=kernel,
        layout=CONTIGUOUS,
        chunks=None,
        stripe=1,
        dropout=0.0,
    )
    expected = _passes([x.double() for x in whole], alone, sink)
    mine = torch.tensor(indices(plan.layout, tokens, plan.cp.size, plan.cp.rank, plan.stripe), device=device)
    found = _passes([x[mine] for x in whole], plan, sink)
    for fabric, before in zip(fabrics, sent, strict=True):
        fabric.sent = before
    errors = {
        name: ((ours.double() - theirs[mine]).abs().max() / theirs.abs().max()).nan_to_num(nan=torch.inf).item()
        for name, ours, theirs in zip(NAMES, found, expected, strict=True)
    }
    worst = max(errors, key=lambda name: errors[name])
    # scores of ALiBi are differences of numbers up to slope * tokens
    slack = 4 * max(plan.alibi or [0.0]) * tokens * (2.0**-53 if dtype == torch.float64 else 2.0**-24)
    return Deviation(worst, errors[worst], LARGEST_ERROR[dtype] + slack)


def _inputs(tokens: int, sizes: CheckedHeads, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return q, k, v and dout, the same on all ranks; the generators of the run are left alone."""
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (sizes.heads, sizes.key_dim),
        (sizes.kv_heads, sizes.key_dim),
        (sizes.kv_heads, sizes.value_dim),
        (sizes.heads, sizes.value_dim),
    )
    return [torch.randn(tokens, 1, *shape, generator=generator).to(device, dtype) for shape in shapes]


def _passes(inputs: list[Tensor], plan: Plan, sink: float | None) -> list[Tensor]:
    *leaves, dout = inputs
    with torch.enable_grad():
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        out = attend(leaves[0], leaves[1], leaves[2], plan, sink=sink)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]
