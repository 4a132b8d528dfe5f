"""Exchange of tokens between two layouts: one message from each rank to each other, with all tensors in it."""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_cp.comm import Fabric
from megatron_cp.context import cache_sizes
from megatron_cp.context.layouts import Layout, moves
from megatron_cp.context.packing import heads_of, packed, unpacked
from megatron_cp.context.remembered import remembered


class Parcel(NamedTuple):
    """Tokens that travel between this rank and another, or stay on it: the stretches of its local tokens."""

    peer: int
    stretches: tuple[slice, ...]
    sizes: tuple[int, ...]


class Parcels(NamedTuple):
    """All tokens of a rank in a change of layouts.

    stay: pairs of the local tokens after and before
    """

    sends: tuple[Parcel, ...]
    recvs: tuple[Parcel, ...]
    stay: tuple[tuple[slice, slice], ...]


def relayout(tensors: Sequence[Tensor], before: Layout, after: Layout, fabric: Fabric) -> list[Tensor]:
    """Move the tokens of tensors [s b * d] from layout `before` to layout `after`; sends (p-1)/p of them."""
    if before == after:
        return list(tensors)
    fused = packed(*tensors) if len(tensors) > 1 else tensors[0]
    result, parcels = (
        torch.empty_like(fused, memory_format=torch.contiguous_format),
        _parcels(before, after, fabric.rank),
    )
    for there, here in parcels.stay:
        result[there] = fused[here]
    sends = [(torch.cat([fused[here] for here in parcel.stretches]), parcel.peer) for parcel in parcels.sends]
    buffers = [result.new_empty((sum(parcel.sizes), *result.shape[1:])) for parcel in parcels.recvs]
    recvs = [(buffer, parcel.peer) for buffer, parcel in zip(buffers, parcels.recvs, strict=True)]
    fabric.exchange(sends, recvs).wait()
    for buffer, parcel in zip(buffers, parcels.recvs, strict=True):
        for there, part in zip(parcel.stretches, buffer.split(parcel.sizes), strict=True):
            result[there] = part
    return unpacked(result, heads_of(*tensors))


@remembered(cache_sizes.GROUPS)
def _parcels(before: Layout, after: Layout, me: int) -> Parcels:
    """Return the tokens of rank `me` that change their place."""
    sends, recvs, stay = [], [], []
    for (src, dst), pair in groupby(moves(before, after), key=lambda move: move[:2]):
        _, _, leaving, arriving = zip(*pair, strict=True)
        if src == dst == me:
            stay += list(zip(arriving, leaving, strict=True))
        elif src == me:
            sends.append(_parcel(dst, leaving))
        elif dst == me:
            recvs.append(_parcel(src, arriving))
    return Parcels(tuple(sends), tuple(recvs), tuple(stay))


def _parcel(peer: int, stretches: tuple[slice, ...]) -> Parcel:
    return Parcel(peer, stretches, tuple(len(range(part.start, part.stop, part.step or 1)) for part in stretches))
