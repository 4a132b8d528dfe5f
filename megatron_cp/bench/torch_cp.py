"""Compare with torch's own `context_parallel`: a ring over its zigzag load balancer, with torch's fused attention."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.nn import functional

from megatron_cp.bench.comparison import Comparison, Implementation
from megatron_cp.context.layouts import ZIGZAG


def enter(comparison: Comparison, name: str) -> Implementation:
    """Return SDPA inside torch's context manager over all ranks; a shape that it refuses raises at the first call."""
    mesh = init_device_mesh(comparison.device.type, (dist.get_world_size(),))
    causal, grouped = comparison.shape.causal, comparison.shape.heads != comparison.shape.kv_heads

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # s b h d -> b h s d and back
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        # the context manager must have a whole buffer to cut; q, k and v are cut already
        tokens = torch.empty(2 * mesh.size(), device=q.device)
        with context_parallel(mesh, buffers=[tokens], buffer_seq_dims=[0]):
            # looked up inside the context, where torch has replaced it
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
        return out.permute(2, 0, 1, 3)

    return Implementation(name, ZIGZAG, attend, _uncounted, trusted=False)


def _uncounted(run: Callable[[], None]) -> None:
    """Run and return None: functional collectives bypass the function that counts messages of other libraries."""
    run()
