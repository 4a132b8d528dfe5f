"""GPipe (arXiv:1811.06965): all forwards, then all backwards."""

from megatron_cp.pipeline.action import Action
from megatron_cp.pipeline.schedules.order import alternate, in_order


def gpipe(p: int, m: int, v: int = 1, slices: int = 1) -> list[list[Action]]:
    """Return all forwards, then all backwards; peak m.

    Backwards run in microbatch order, as in Megatron, so that gradients add up in the same order. The paper reverses
    them, which takes the same time. In slices this is TeraPipe (arXiv:2102.07988).
    """
    return [alternate(*in_order(rank, m, slices=slices), warmup=m * slices) for rank in range(p)]
