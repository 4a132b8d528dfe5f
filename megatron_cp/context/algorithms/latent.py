"""Ring Attention over the latent of multi-latent attention: the compressed tokens travel, each rank expands them.

A token's latent has r + p numbers: r are expanded by a weight to the keys and values of all heads, p are the rotary
part of the keys, one for all heads. A hop carries these in the place of h (d + dv) numbers of keys and values, and the
backward pass expands each block again, so that neither messages nor what is saved has a head.
Source: the ring of `ring.py`; the latent of DeepSeek-AI 2024, arXiv:2405.04434, section 2.1. The module satisfies
`Loop` with the latent as `k` and the weight as `v`. Traffic: `LATENT_TRAFFIC` in `megatron_cp.context.latent`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_cp.context.algorithms.ring import route
from megatron_cp.context.circulate import Route, Shard, circulate
from megatron_cp.context.merge import SoftmaxMerge, Sum, accumulator_dtype
from megatron_cp.context.returns import Outgoing, Returns, incoming
from megatron_cp.context.task import Block, Saved, Task


class Widths(NamedTuple):
    """The parts of a latent and of an expanded head.

    rank:   r, the compressed part of a latent
    rotary: p, the rest of it, and the last of a key
    plain:  d - p, the part of a key that is expanded
    value:  dv
    """

    rank: int
    rotary: int
    plain: int
    value: int

    @classmethod
    def of(cls, q: Tensor, latent: Tensor, up: Tensor) -> "Widths":
        """Return the widths of q [s b h d], latent [s b 1 (r p)] and weight [h (d-p dv) r]."""
        rank = up.shape[2]
        rotary = latent.shape[3] - rank
        plain = q.shape[3] - rotary
        return cls(rank, rotary, plain, up.shape[1] - plain)


class LatentBlock(NamedTuple):
    """The tokens of rank `owner` that this rank wants, from its local token `first` on, as latent s b 1 (r p)."""

    owner: int
    first: int
    latent: Tensor


def forward(q: Tensor, k: Tensor, v: Tensor, task: Task) -> tuple[Tensor, Saved]:
    """Attend: q [s b h d] over latents k [s b 1 (r p)], expanded by the weight v [h (d-p dv) r] -> out [s b h dv].

    Per rank at most (p - 1) s b (r + p) elements are sent, what no rank further on sees stays behind. The expanded keys
    and values of one block are alive at a time.
    """
    latent, up, widths = k, v, Widths.of(q, k, v)
    merge = SoftmaxMerge(q, widths.value)
    for piece in _pieces(latent, route(task.layout, task.mask), task):
        if piece.latent.shape[0]:
            task.attend(merge, q, Block(piece.owner, piece.first, *expand(piece.latent, up, widths)))
    out, lse = merge.result()
    return out, Saved(q, latent, up, out, lse)


def backward(dout: Tensor, saved: Saved, task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate: dout [s b h dv] -> dq, dlatent [s b 1 (r p)] and this rank's part of the weight's gradient.

    A rank's part of a block's dlatent goes to the owner in the dtype of the latent, rounded once by the product that
    makes it, and is added there in float32. Every rank has expanded every block that it saw: the gradient of the weight
    is the sum of the ranks' parts, as that of any weight of which each rank used a copy.
    """
    latent, up, widths = saved.k, saved.v, Widths.of(saved.q, saved.k, saved.v)
    dq, dlatent = Sum(saved.q), Sum(latent)
    dup = torch.zeros(up.shape, dtype=accumulator_dtype(up), device=up.device)
    way, returns, me = route(task.layout, task.mask), Returns(task.fabric), task.fabric.rank
    for hop, piece in enumerate(_pieces(latent, way, task)):
        part = piece.latent
        if piece.latent.shape[0]:
            k, v = expand(piece.latent, up, widths)
            dk, dv = Sum(k), Sum(v)
            task.attend_backward(dq, dk, dv, dout, saved, Block(piece.owner, piece.first, k, v))
            part = compress(dk.result(), dv.result(), piece.latent, up, dup, widths)
        if piece.owner == me:
            dlatent.add(slice(piece.first, piece.first + part.shape[0]), part)
            continue
        worker = (me + way.turn * hop) % task.fabric.size
        returns.start([Outgoing(piece.owner, [part])], incoming(worker, way.wanted[me][worker], dlatent))
    returns.finish()
    return dq.result(), dlatent.result(), dup.to(up.dtype)


def expand(latent: Tensor, up: Tensor, widths: Widths) -> tuple[Tensor, Tensor]:
    """Return k [s b h d] and v [s b h dv] of a latent [s b 1 (r p)]."""
    heads = up.shape[0]
    compressed, rotary = latent.split([widths.rank, widths.rotary], 3)
    # s b r, (h (d-p dv)) r -> s b h (d-p dv)
    both = (compressed.squeeze(2) @ up.flatten(0, 1).t()).unflatten(2, (heads, -1))
    plain, v = both.split([widths.plain, widths.value], 3)
    return torch.cat([plain, rotary.expand(-1, -1, heads, -1)], 3), v


def compress(dk: Tensor, dv: Tensor, latent: Tensor, up: Tensor, dup: Tensor, widths: Widths) -> Tensor:
    """Return the gradient [s b 1 (r p)] of a latent by those of its expanded k and v, and add the weight's to `dup`."""
    dplain, drotary = dk.split([widths.plain, widths.rotary], 3)
    # s b h (d-p dv) -> (s b) (h (d-p dv))
    dboth = torch.cat([dplain, dv], 3).flatten(2).flatten(0, 1)
    compressed = latent[..., : widths.rank].flatten(0, 2)
    dup += (dboth.t() @ compressed).view_as(dup)
    dcompressed = (dboth @ up.flatten(0, 1)).view(*latent.shape[:3], widths.rank)
    one = drotary.sum(2, keepdim=True, dtype=accumulator_dtype(drotary)).to(latent.dtype)
    return torch.cat([dcompressed, one], 3)


def _pieces(latent: Tensor, way: Route, task: Task) -> Iterator[LatentBlock]:
    """Yield the tokens that this rank wants of its own latent, then of every other rank's; the next are in flight."""
    me = task.fabric.rank
    for (shard,) in circulate([Shard(me, 0, [latent])], [way], task.fabric):
        wanted = way.wanted[shard.owner][me]
        (part,) = shard.part(wanted)
        yield LatentBlock(shard.owner, wanted.start, part)
        del shard, part
