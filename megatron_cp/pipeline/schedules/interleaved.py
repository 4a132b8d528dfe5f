"""Interleaved 1F1B: PTD-P (arXiv:2104.04473), Megatron's virtual pipeline."""

from megatron_cp.pipeline.action import Action
from megatron_cp.pipeline.placement import loop
from megatron_cp.pipeline.schedules.order import alternate, in_groups


def interleaved(p: int, m: int, v: int) -> list[list[Action]]:
    """Groups of p microbatches through v chunks after 2(p - 1 - r) + (v - 1)p forwards.

    Idle (p - 1)(T_F + T_I + T_W) / v, peak 2(p - 1 - r) + (v - 1)p + 1 chunks.
    """
    return [
        alternate(*in_groups(stages, m, p, split=False), warmup=2 * (p - 1 - rank) + (v - 1) * p)
        for rank, stages in enumerate(loop(p, v).of_rank)
    ]
