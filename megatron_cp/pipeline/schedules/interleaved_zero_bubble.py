"""Interleaved zero bubble: the interleaved order (arXiv:2104.04473) with the delayed W of H1 (arXiv:2401.10241)."""

from megatron_cp.errors import Refused
from megatron_cp.pipeline.action import Action
from megatron_cp.pipeline.placement import loop
from megatron_cp.pipeline.schedules.order import alternate, delay_weights, in_groups, joined


def izb(p: int, m: int, v: int, warmup: float = 1.0, slices: int = 1) -> list[list[Action]]:
    """Rank r starts with warmup * (p - 1 - r) + (v - 1)p forwards; a W trails r input gradients. v = 1 is H1.

    warmup: 1 keeps the peak at v p chunks on every rank, with idle (p - 1)(T_F + T_I - T_W) / v; up to 2, the warm-up
            of plain interleaving, hides more of the transfers for up to p - 1 chunks more. Raises ValueError outside.
    In k slices rank r starts with warmup * (p - 1 - r) + k v - 1 forwards: idle (p - 1)(T_F + T_I - T_W) / (k v), peak
    1 + (p - 1) / (k v) microbatches on every rank, where p divides k and for equal times.
    """
    if not 1 <= warmup <= 2:
        raise Refused(f"the warm-up multiplier of izb lies between 1 and 2, got {warmup}")
    first = v * max(map(len, joined(m, slices, p))) - 1 if slices > 1 else (v - 1) * p
    return [
        list(
            delay_weights(
                alternate(
                    *in_groups(stages, m, p, split=True, slices=slices), warmup=int(warmup * (p - 1 - rank)) + first
                ),
                rank,
            )
        )
        for rank, stages in enumerate(loop(p, v).of_rank)
    ]
