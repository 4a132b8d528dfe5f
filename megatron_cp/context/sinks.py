"""Attention sinks: one more logit per query head, which takes a share of the softmax and has no value.

A sink is one merge of rows that have met all of their keys: lse' = logaddexp(lse, sink), out' = out exp(lse - lse').
Backward passes that are given out' and lse' are right as they are, because they make P' = exp(S - lse') and
delta' = sum(out' dout) of them. The sink's own gradient is -sum(exp(sink - lse') delta') over rows.

Source: Xiao et al. 2023, arXiv:2309.17453, section 3.3; the off-by-one softmax (Miller 2023) is a sink of 0.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from megatron_cp.context.delta import delta


def merged(
    out: Float[Tensor, "s b h d"], lse: Float[Tensor, "s b h"], sink: Float[Tensor, "*b h"]
) -> tuple[Float[Tensor, "s b h d"], Float[Tensor, "s b h"]]:
    """Merge the sink, in the dtype of lse, into rows that have met all keys; return out and lse."""
    # a row without keys has lse -inf, and beside a sink of -inf no share to give
    share = (lse - sink).nan_to_num_(nan=-torch.inf).sigmoid_()[..., None]
    return torch.mul(out, share, out=torch.empty_like(out)), torch.logaddexp(lse, sink)


def gradient(
    dout: Float[Tensor, "s b h d"],
    out: Float[Tensor, "s b h d"],
    lse: Float[Tensor, "s b h"],
    sink: Float[Tensor, "*b h"],
) -> Float[Tensor, "*b h"]:
    """Return the part of the sink's gradient that comes from these rows, into which it is merged."""
    share = (sink - lse).nan_to_num_(nan=-torch.inf).exp_()
    return -(share * delta(out, dout)).sum_to_size(sink.shape)
