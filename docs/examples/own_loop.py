"""Attention over a sequence cut over processes: torchrun --nproc-per-node 2 docs/examples/own_loop.py"""

import torch
import torch.distributed as dist
from torch.nn.functional import scaled_dot_product_attention

from megatron_cp import attend, plan, positions, shard, unshard

TOKENS, BATCH, HEADS, KV_HEADS, HEAD_DIM = 64, 1, 4, 2, 16


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()

    # the whole sequence, the same on every rank: here only to be cut and compared with
    torch.manual_seed(1)
    q = torch.randn(TOKENS, BATCH, HEADS, HEAD_DIM)
    k, v = torch.randn(2, TOKENS, BATCH, KV_HEADS, HEAD_DIM)

    # made once for a model; all ranks make it together
    how = plan("zigzag", cp=dist.group.WORLD, causal=True)

    # this rank's tokens of everything that has a sequence, and their positions: rotary embeddings want these
    q_mine, k_mine, v_mine = (shard(x, how).requires_grad_() for x in (q, k, v))
    mine = positions(how, TOKENS)
    out = attend(q_mine, k_mine, v_mine, how)
    out.square().mean().backward()

    heads_first = [x.permute(1, 2, 0, 3) for x in (q, k, v)]
    whole = scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).permute(2, 0, 1, 3)
    torch.testing.assert_close(out, whole[mine])
    torch.testing.assert_close(unshard(out, how), whole.detach())
    assert q_mine.grad is not None
    print(f"rank {rank}: {len(mine)} tokens, {how.sent:,} bytes sent")


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
