"""Columns of queries and keys by which a kernel drops attention weights, the same ones however tokens are laid out."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from megatron_cp.context.layouts import Runs
from megatron_cp.errors import Refused, shown
from megatron_cp.kernels.dropout import as_digits, mixed

MOST_HEADS = 1 << 16
"""Query heads of the whole model, and sequences of a batch, that have rows of their own."""


class DropoutSeed(NamedTuple):
    """The seed of one attention's dropped weights.

    seed:       a whole number, or an int64 tensor with one, which no host waits for
    first_head: number of this rank's first query head among all, where tensor-parallel ranks share them
    """

    seed: int | Tensor
    first_head: int = 0


def labelled(
    q: Float[Tensor, "s b h d"], k: Float[Tensor, "s b g d"], mine: Runs, seed: DropoutSeed
) -> tuple[Float[Tensor, "s b h _"], Float[Tensor, "s b g _"]]:
    """Return queries with the seeds of their rows and keys with their positions, in further columns."""
    batch, heads = q.shape[1:3]
    places = torch.cat([torch.arange(run.start, run.stop, run.step) for run in mine]).to(q.device, non_blocking=True)
    # one number for each sequence, head and position
    head = torch.arange(seed.first_head, seed.first_head + heads, device=q.device)
    row = torch.arange(batch, device=q.device)[:, None] * MOST_HEADS + head
    rows = mixed(mixed(seed.seed, row), places[:, None, None])
    keys = places[:, None, None].expand(*k.shape[:3])
    return torch.cat([q, as_digits(rows, q.dtype)], -1), torch.cat([k, as_digits(keys, k.dtype)], -1)


def as_rate(rate: object) -> float:
    """Return a rate of dropout; raises ValueError for anything but a number from 0 to below 1."""
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
        raise Refused(f"dropout is the part of attention weights that is dropped, 0 to below 1, got {shown(rate)}")
    return float(rate)


def as_seed(seed: DropoutSeed | Tensor | int | None, rate: float, q: object) -> DropoutSeed | None:
    """Return the seed of a call; raises ValueError for one that its plan cannot use."""
    if seed is None:
        return None
    if not rate:
        raise Refused("dropout_seed is for a plan that drops weights, got one without; give plan(dropout=RATE)")
    made = seed if isinstance(seed, DropoutSeed) else DropoutSeed(seed)
    number = made.seed
    whole = number.dtype == torch.int64 and number.numel() == 1 if isinstance(number, Tensor) else type(number) is int
    if not whole:
        raise Refused(f"dropout_seed must be a whole number or an int64 tensor with one, got {shown(number)}")
    if isinstance(number, Tensor):
        number = number.reshape(())
    elif not -(2**63) <= number < 2**63:
        raise Refused(f"dropout_seed must fit 64 bits, got {number}")
    if isinstance(q, Tensor) and q.ndim == 4 and max(q.shape[1], made.first_head + q.shape[2]) > MOST_HEADS:
        raise Refused(
            f"dropout tells {MOST_HEADS} sequences and query heads apart, got {q.shape[1]} and "
            f"{made.first_head + q.shape[2]}; use smaller batches"
        )
    return DropoutSeed(number, made.first_head)
