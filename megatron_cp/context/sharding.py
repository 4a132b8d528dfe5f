"""Cut whole sequences for the ranks of a plan, put them together again, and say which positions a rank has."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_cp.context.agreement import agree, refused_by_all
from megatron_cp.context.function import refuse_transforms
from megatron_cp.context.inputs import check_dense
from megatron_cp.context.layouts import indices
from megatron_cp.context.plan import Plan, check_plan
from megatron_cp.errors import Refused, shown


def positions(plan: Plan, tokens: int, *, device: torch.device | str | None = None) -> Tensor:
    """Return the positions of this rank's tokens in local order, int64 [s], of a sequence of `tokens`.

    They are those of rotary embeddings, and index token ids, labels and masks of the whole sequence. Communicates
    nothing. Raises ValueError for a length that the plan's layout does not divide.
    """
    check_plan(plan)
    if type(tokens) is not int or tokens < 1:
        raise Refused(f"tokens is the length of the whole sequence, a whole number of 1 or more, got {shown(tokens)}")
    return torch.tensor(indices(plan.layout, tokens, plan.cp.size, plan.cp.rank, plan.stripe), device=device)


def shard(whole: Tensor, plan: Plan, *, dim: int = 0) -> Tensor:
    """Return this rank's tokens of a tensor that every rank holds whole, cut along `dim`; differentiable.

    Communicates nothing. Raises ValueError for a length that the plan's layout does not divide.
    """
    check_plan(plan)
    _check(whole, dim)
    return whole.index_select(dim, positions(plan, whole.shape[dim], device=whole.device))


@torch.compiler.disable(reason="the exchange of a whole tensor is not compiled")
def unshard(local: Tensor, plan: Plan, *, dim: int = 0) -> Tensor:
    """Return the whole tensor of which each rank holds the tokens that `shard` gives it; without gradient.

    All ranks of the plan call it together; each sends (p-1) times its tensor. Raises ValueError on every rank when
    shapes, dtypes, `dim` or plans differ between ranks; nothing but their comparison is sent before.
    """
    check_plan(plan)
    with refused_by_all(plan, local):
        refuse_transforms("the exchange of a whole tensor")
        _check(local, dim)
        _order(plan, plan.cp.size * local.shape[dim])
    agree(plan, local.movedim(dim, 0), gradients=False, choices=(f"dim={dim % local.ndim}",))
    size = plan.cp.size
    with torch.no_grad():
        gathered = plan.cp.all_gather(local.detach().movedim(dim, 0).contiguous()).flatten(0, 1)
        whole = torch.empty_like(gathered)
        whole[torch.tensor(_order(plan, size * local.shape[dim]), device=local.device)] = gathered
        return whole.movedim(0, dim).contiguous()


def _order(plan: Plan, tokens: int) -> Sequence[int]:
    """Return the positions of the tokens of rank 0, then of rank 1 and so on."""
    of_ranks = (indices(plan.layout, tokens, plan.cp.size, rank, plan.stripe) for rank in range(plan.cp.size))
    return [position for mine in of_ranks for position in mine]


def _check(x: Tensor, dim: int) -> None:
    if not isinstance(x, Tensor):
        raise Refused(f"a tensor is cut along its tokens, got a {type(x).__name__}")
    check_dense("a tensor that is cut", x, "of any dims")
    if type(dim) is not int or not -x.ndim <= dim < x.ndim or not x.shape[dim]:
        raise Refused(f"dim {shown(dim)} must be one of {x.ndim} dims and hold tokens, got shape {tuple(x.shape)}")
