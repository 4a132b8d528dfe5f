"""Attention over a sequence sharded on ranks, through any backend."""

from jaxtyping import Float
from torch import Tensor

from megatron_cp.context.agreement import agree_on_shapes
from megatron_cp.context.auto import settle
from megatron_cp.context.function import run
from megatron_cp.context.plan import Plan, Sizes, plan

__all__ = ["Plan", "Sizes", "attend", "plan"]


def attend(
    q: Float[Tensor, "s b h d"],
    k: Float[Tensor, "s b g d"],
    v: Float[Tensor, "s b g d"],
    plan: Plan,
    *,
    agreed: bool = False,
) -> Float[Tensor, "s b h d"]:
    """Attend this rank's queries to the whole sequence, differentiably; all ranks of the plan call it together.

    Every call first compares the shapes of all ranks, in one all-gather of 96 bytes per rank. With `agreed` the caller
    guarantees that they are equal, and the call sends the algorithm's messages only: Megatron cuts every batch for its
    ranks by one rule, so its layers compare at their first call and after a change of their own shapes.

    Raises ValueError on every rank when shapes differ between ranks, and when lengths or heads do not fit the
    algorithm; nothing but the comparison is sent before.
    """
    if not agreed:
        agree_on_shapes(plan.cp, q, k, v)
    return run(q, k, v, settle(plan, _sizes(q, k, plan)))


def _sizes(q: Tensor, k: Tensor, plan: Plan) -> Sizes:
    dtype = str(q.dtype).removeprefix("torch.")
    return Sizes(q.shape[0] * plan.cp.size, q.shape[2], k.shape[2], q.shape[3], dtype, q.device.type)
