"""1F1B with a flush per step: PipeDream-Flush (arXiv:2006.09503), DAPPLE's policy A, Megatron's own."""

from megatron_cp.pipeline.action import Action
from megatron_cp.pipeline.schedules.order import alternate, in_order


def one_forward_one_backward(p: int, m: int, v: int = 1) -> list[list[Action]]:
    """Rank r starts with p - 1 - r forwards. Idle (p - 1)(T_F + T_I + T_W), peak p - r."""
    return [alternate(*in_order(rank, m), warmup=p - 1 - rank) for rank in range(p)]
