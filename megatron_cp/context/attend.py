"""Attention over a sequence sharded on ranks, through any backend."""

from jaxtyping import Float
from torch import Tensor

from megatron_cp.comm import Fabric, values_of_all
from megatron_cp.context.auto import settle
from megatron_cp.context.function import run
from megatron_cp.context.plan import Plan, Sizes, plan
from megatron_cp.errors import Refused

__all__ = ["Plan", "Sizes", "attend", "plan"]


def attend(
    q: Float[Tensor, "s b h d"], k: Float[Tensor, "s b g d"], v: Float[Tensor, "s b g d"], plan: Plan
) -> Float[Tensor, "s b h d"]:
    """Attention of this rank's queries over the whole sequence, differentiable; all ranks of the plan call it together.

    Raises ValueError when lengths or heads do not fit the algorithm or differ between ranks, before anything else is
    sent.
    """
    if not plan.met:
        _agree(q, k, plan.cp)
        plan.met.append(tuple(q.shape))
    return run(q, k, v, settle(plan, _sizes(q, k, plan)))


def _sizes(q: Tensor, k: Tensor, plan: Plan) -> Sizes:
    dtype = str(q.dtype).removeprefix("torch.")
    return Sizes(q.shape[0] * plan.cp.size, q.shape[2], k.shape[2], q.shape[3], dtype, q.device.type)


def _agree(q: Tensor, k: Tensor, cp: Fabric) -> None:
    """Ranks with different shapes would wait for each other for ever; found once, by all, at a plan's first use."""
    if cp.size == 1:
        return
    shapes = values_of_all(cp, q.device, (*q.shape, k.shape[2]))
    if len(set(shapes)) > 1:
        each = ", ".join(f"rank {rank}: {shape[0]}" for rank, shape in enumerate(shapes))
        if len({shape[0] for shape in shapes}) > 1:
            raise Refused(f"all ranks must hold equally many tokens, got {each}; pad the sequence to a common length")
        raise Refused(f"all ranks must hold q and k of one shape, got (s, b, h, d, g) {shapes}")
