"""Breadth-first pipeline (arXiv:2211.05953): all microbatches through one chunk before the next chunk."""

from megatron_cp.pipeline.action import Action
from megatron_cp.pipeline.placement import loop
from megatron_cp.pipeline.schedules.order import alternate, in_groups


def breadth_first(p: int, m: int, v: int) -> list[list[Action]]:
    """All forwards, then all backwards, chunk by chunk, so each chunk's weights are gathered and reduced once.

    Idle (p - 1)(T_F + T_I + T_W) / v, peak m.
    """
    return [alternate(*in_groups(stages, m, m, split=False), warmup=m * v) for stages in loop(p, v).of_rank]
