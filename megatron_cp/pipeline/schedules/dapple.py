"""DAPPLE (arXiv:2007.01045), policy B: 1F1B with a deeper warm-up that hides the transfers' round trip."""

from megatron_cp.pipeline.action import Action
from megatron_cp.pipeline.schedules.order import alternate, in_order


def policy_b(p: int, m: int, v: int = 1, slices: int = 1) -> list[list[Action]]:
    """Rank r admits 2(p - r) - 1 microbatches, which is also its peak. Policy A is 1F1B."""
    return [alternate(*in_order(rank, m, slices=slices), warmup=2 * (p - 1 - rank) + slices - 1) for rank in range(p)]
