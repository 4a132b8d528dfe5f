"""Cross-attention: ranks hold other numbers of keys than of queries, and each query sees the keys of all ranks.

The shorter of the two is padded on each rank to the length of the other, and a mask with pieces keeps the pads out, so
that every algorithm runs as it does over packed documents: pads are in no kernel call.
"""

from functools import lru_cache

from torch import Tensor
from torch.nn.functional import pad

from megatron_cp.context import cache_sizes
from megatron_cp.context.documents import Documents, TokenSet
from megatron_cp.context.inputs import check_inputs
from megatron_cp.context.layouts import CONTIGUOUS, layout
from megatron_cp.context.masks import FULL
from megatron_cp.context.plan import Plan
from megatron_cp.errors import Refused


def is_cross(q: object, k: object) -> bool:
    """True if there are other numbers of keys than of queries."""
    if not isinstance(q, Tensor) or not isinstance(k, Tensor) or q.is_nested or k.is_nested:
        return False
    return q.ndim == k.ndim == 4 and q.shape[0] != k.shape[0]


def evened(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, documents: bool, drops: bool
) -> tuple[Tensor, Tensor, Tensor, Documents]:
    """Return q, k and v of one length, and what their real tokens see; differentiable.

    documents: the caller gave some
    drops:     some weights are dropped
    Raises ValueError for tensors that do not fit, and for what is told by positions, of which queries and keys then
    have none in common: a causal mask, a window, documents and dropped weights.
    """
    check_inputs(q, k, v, cross=True)
    told = {
        "a causal mask": plan.mask.causal,
        "a window": plan.mask.window,
        "documents": documents,
        "dropout_seed": drops,
    }
    if refused := [name for name, given in told.items() if given]:
        raise Refused(
            f"cross-attention, of {q.shape[0]} queries of this rank over {k.shape[0]} keys, lets each query see all "
            f"keys, got {' and '.join(refused)}; make the plan with causal=False and leave the others out, "
            "or give q and k equally many tokens"
        )
    queries, keys = q.shape[0], k.shape[0]
    # what layouts, stripes and chunks want to divide
    unit = 2 * plan.stripe * (plan.chunks or 1)
    each = -(-max(queries, keys) // unit) * unit
    q, k, v = (pad(x, (0, 0, 0, 0, 0, 0, 0, each - x.shape[0])) for x in (q, k, v))
    return q, k, v, _seen(plan.cp.size, each, queries, keys)


@lru_cache(cache_sizes.LAYOUTS)
def _seen(ranks: int, each: int, queries: int, keys: int) -> Documents:
    """Return which of `each` tokens a rank are seen, where the first ones are real: in as few sets as there can be."""
    starts = range(0, ranks * each, each)

    def real(tokens: int) -> list[range]:
        return [range(ranks * each)] if tokens == each else [range(start, start + tokens) for start in starts]

    sets = [TokenSet(q, kv, FULL) for q in real(queries) for kv in real(keys)]
    return Documents(sets, ranks * each, layout(CONTIGUOUS, ranks * each, ranks))
