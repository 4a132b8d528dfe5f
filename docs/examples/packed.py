"""Packed documents on two processes: torchrun --nproc-per-node 2 docs/examples/packed.py"""

import torch
import torch.distributed as dist

from megatron_cp import attend
from megatron_cp.comm import GroupFabric
from megatron_cp.context.attend import plan
from megatron_cp.context.documents import documents


def main() -> None:
    dist.init_process_group("gloo")
    how = plan("zigzag", cp=GroupFabric(dist.group.WORLD), causal=True)
    # each microbatch has documents of its own: here of 7, 1 and 20 tokens, and pads up to the 32 of both ranks
    packed = documents(torch.tensor([0, 7, 8, 28, 32], dtype=torch.int32))
    q, k, v = (torch.randn(16, 1, 4, 8, requires_grad=True) for _ in range(3))
    for _ in range(2):
        out = attend(q, k, v, how, documents=packed)
        out.sum().backward()
    assert out.shape == q.shape


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
