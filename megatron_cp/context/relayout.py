"""Other positions on the same ranks: one exchange, all tensors in it together."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_cp.comm import Fabric
from megatron_cp.context.layouts import Layout, moves


def relayout(tensors: Sequence[Tensor], before: Layout, after: Layout, fabric: Fabric) -> list[Tensor]:
    """Tensors [s b * d] with their tokens laid out as `before` -> laid out as `after`; sends (p-1)/p of them."""
    if before == after:
        return list(tensors)
    me, fused = fabric.rank, torch.cat(list(tensors), 2) if len(tensors) > 1 else tensors[0]
    result = torch.empty_like(fused, memory_format=torch.contiguous_format)
    sends, recvs = [], []
    for src, dst, src_tokens, dst_tokens in moves(before, after):
        if src == dst == me:
            result[dst_tokens] = fused[src_tokens]
        elif src == me:
            sends.append((fused[src_tokens].contiguous(), dst))
        elif dst == me:
            recvs.append((torch.empty_like(result[dst_tokens], memory_format=torch.contiguous_format), src, dst_tokens))
    fabric.exchange(sends, [(buffer, src) for buffer, src, _ in recvs]).wait()
    for buffer, _, dst_tokens in recvs:
        result[dst_tokens] = buffer
    return list(result.split([tensor.shape[2] for tensor in tensors], dim=2))
