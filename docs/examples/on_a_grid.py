"""USP on four processes: torchrun --nproc-per-node 4 docs/examples/on_a_grid.py"""

import torch
import torch.distributed as dist

from megatron_cp import attend, plan
from megatron_cp.comm import GroupFabric, axes_of
from megatron_cp.grid import Grid


def main() -> None:
    dist.init_process_group("gloo")
    cp = GroupFabric(dist.group.WORLD)
    # ranks 0 and 1 exchange heads, as 2 and 3 do; 0 and 2 are a ring, as 1 and 3 are
    inner, outer = axes_of(Grid(2, 2), cp)
    how = plan("usp", cp=cp, inner=inner, outer=outer, layout="contiguous")
    q, k, v = (torch.randn(16, 1, 4, 8, requires_grad=True) for _ in range(3))
    out = attend(q, k, v, how)
    out.sum().backward()
    assert out.shape == q.shape


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
