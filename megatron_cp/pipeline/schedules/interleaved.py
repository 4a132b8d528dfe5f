"""Interleaved 1F1B: PTD-P (arXiv:2104.04473), Megatron's virtual pipeline."""

from megatron_cp.pipeline.action import Action
from megatron_cp.pipeline.placement import loop
from megatron_cp.pipeline.schedules.order import alternate, in_groups, joined


def interleaved(p: int, m: int, v: int, slices: int = 1) -> list[list[Action]]:
    """Groups of p microbatches through v chunks after 2(p - 1 - r) + (v - 1)p forwards.

    Idle (p - 1)(T_F + T_I + T_W) / v, peak 2(p - 1 - r) + (v - 1)p + 1 chunks.
    In slices: 2(p - 1 - r) + k v - 1 forwards, idle (p - 1)(T_F + T_I + T_W) / (k v) where p divides k.
    """
    first = v * max(map(len, joined(m, slices, p))) - 1 if slices > 1 else (v - 1) * p
    return [
        alternate(*in_groups(stages, m, p, split=False, slices=slices), warmup=2 * (p - 1 - rank) + first)
        for rank, stages in enumerate(loop(p, v).of_rank)
    ]
