"""Exchange of tokens between two layouts: one message from each rank to each other, with all tensors in it."""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from megatron_cp.comm import Fabric
from megatron_cp.context.layouts import Layout, moves


def relayout(tensors: Sequence[Tensor], before: Layout, after: Layout, fabric: Fabric) -> list[Tensor]:
    """Move the tokens of tensors [s b * d] from layout `before` to layout `after`; sends (p-1)/p of them."""
    if before == after:
        return list(tensors)
    me, fused = fabric.rank, torch.cat(list(tensors), 2) if len(tensors) > 1 else tensors[0]
    result = torch.empty_like(fused, memory_format=torch.contiguous_format)
    sends, recvs, stretches = [], [], []
    for (src, dst), pair in groupby(moves(before, after), key=lambda move: move[:2]):
        _, _, src_tokens, dst_tokens = zip(*pair, strict=True)
        if src == dst == me:
            for there, here in zip(dst_tokens, src_tokens, strict=True):
                result[there] = fused[here]
        elif src == me:
            sends.append((torch.cat([fused[here] for here in src_tokens]), dst))
        elif dst == me:
            tokens = sum(len(result[there]) for there in dst_tokens)
            recvs.append((result.new_empty((tokens, *result.shape[1:])), src))
            stretches.append(dst_tokens)
    fabric.exchange(sends, recvs).wait()
    for (buffer, _), dst_tokens in zip(recvs, stretches, strict=True):
        parts = buffer.split([len(result[there]) for there in dst_tokens])
        for there, part in zip(dst_tokens, parts, strict=True):
            result[there] = part
    return list(result.split([tensor.shape[2] for tensor in tensors], dim=2))
