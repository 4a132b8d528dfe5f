"""Ring Self-Attention: the keys travel around the ring until every query has its whole row of scores, then the values.

The only algorithm here that ever holds whole rows of scores, so the one that can show the attention probabilities and
take a dense additive bias. It computes in float32 (float64 for float64) itself, without a kernel.

Traffic per rank, U = s b g d: forward (p-1) U for K and (p-1) U for V; backward the same, V first, and (p-1) U each
for dK and dV, which go straight to their owners where the paper all-reduces gradients of the whole sequence and has
2 (p-1) U each. Under a causal mask on the zigzag layout all of this is 3/4, summed over ranks. Memory: rows of scores,
b h s S elements, twice at most while a pass runs; none of them is kept for the backward pass, which makes them again.

Source: Li et al. 2021, arXiv:2105.13120, section 3.2; there every query sees every key.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_cp.context.algorithms.ring import Homecoming, route
from megatron_cp.context.layouts import Runs, cut, length
from megatron_cp.context.masks import Mask
from megatron_cp.context.merge import Sum, accumulator_dtype
from megatron_cp.context.returns import empty_like, exchange
from megatron_cp.context.task import Block, Saved, Task


def forward(q: Tensor, k: Tensor, v: Tensor, task: Task) -> tuple[Tensor, Saved]:
    """q [s b h d], k and v [s b g d] of this rank -> out [s b h d]."""
    return forward_with_bias(q, k, v, None, task)


def backward(dout: Tensor, saved: Saved, task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """dout [s b h d] -> dq, dk, dv."""
    dq, dk, dv, _ = backward_with_bias(dout, saved, None, task)
    return dq, dk, dv


def forward_with_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, task: Task) -> tuple[Tensor, Saved]:
    scores = score_rows(q, k, bias, task)
    lse = scores.logsumexp(-1)
    weights = probabilities(scores, lse)
    total = Sum(q)
    for visitor in _visits(v, task):
        # b g r s t, t b g d -> s b (g r) d
        part = torch.einsum("bgrst,tbgd->sbgrd", weights[..., visitor.columns], _wide(visitor.x))
        total.add(slice(None), part.flatten(2, 3))
    out = total.result()
    # b g r s -> s b (g r)
    return out, Saved(q, k, v, out, lse.permute(3, 0, 1, 2).flatten(2, 3))


def backward_with_bias(
    dout: Tensor, saved: Saved, bias: Tensor | None, task: Task
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv, dbias by P = exp(S - lse), dP = dO V', dS = P (dP - rowsum(O dO)); dP by rows, the rest by pieces."""
    groups = saved.k.shape[2]
    q, out, dout_ = (_grouped(x, groups) for x in (saved.q, saved.out, dout))
    # s b (g r) -> b g r s
    lse, delta = (
        x.unflatten(2, (groups, -1)).permute(1, 2, 3, 0) for x in (saved.lse, (out * dout_).sum(-1).flatten(2))
    )
    rows = _empty_rows(saved.q, groups, task, 0.0)
    for visitor in _visits(saved.v, task):
        rows[..., visitor.columns] = torch.einsum("sbgrd,tbgd->bgrst", dout_, _wide(visitor.x))
    dq, dk, dv = Sum(saved.q), Sum(saved.k), Sum(saved.v)
    home = Homecoming(_mine(saved.k, task).block, dk, dv, route(task.runs, task.mask), task.fabric)
    for visitor in _visits(saved.k, task):
        dk_here, dv_here = home.sums(visitor.block)
        weights = probabilities(_piece_of_scores(q, visitor, bias, task), lse)
        dscores = weights * (rows[..., visitor.columns] - delta[..., None])
        dq.add(slice(None), torch.einsum("bgrst,tbgd->sbgrd", dscores, _wide(visitor.x)).flatten(2, 3) * task.scale)
        dk_here.add(slice(None), torch.einsum("bgrst,sbgrd->tbgd", dscores, q) * task.scale)
        dv_here.add(slice(None), torch.einsum("bgrst,sbgrd->tbgd", weights, dout_))
        home.start(visitor.block, dk_here, dv_here)
        rows[..., visitor.columns] = dscores
    home.finish()
    return dq.result(), dk.result(), dv.result(), None if bias is None else _bias_gradient(rows, bias, task)


class _Visitor(NamedTuple):
    """Keys or values on a visit: tokens of rank `owner`, whose are `runs`, from its local token `first` on."""

    owner: int
    first: int
    x: Tensor
    runs: Runs

    @property
    def columns(self) -> slice:
        """Where the tokens stand in a row of scores: rank after rank, all ranks have as many."""
        start = self.owner * length(self.runs) + self.first
        return slice(start, start + len(self.x))

    @property
    def positions(self) -> Tensor:
        return _positions(cut(self.runs, slice(self.first, self.first + len(self.x))), self.x)

    @property
    def block(self) -> Block:
        """The same as a block, for the gradients of K and V."""
        return Block(self.owner, self.first, self.x, self.x, self.runs)

    def part(self, tokens: slice) -> "_Visitor":
        """These tokens of the owner."""
        return self._replace(first=tokens.start, x=self.x[tokens.start - self.first : tokens.stop - self.first])


def _mine(x: Tensor, task: Task) -> _Visitor:
    return _Visitor(task.fabric.rank, 0, x, task.mine)


def _visits(x: Tensor, task: Task) -> Iterator[_Visitor]:
    """All of this rank's x, then what this rank sees of every other's; the next is in flight during the body."""
    fabric, way = task.fabric, route(task.runs, task.mask)
    ahead, behind = (fabric.rank + way.turn) % fabric.size, (fabric.rank - way.turn) % fabric.size
    held = shown = _mine(x, task)
    for hop in range(1, fabric.size):
        owner = (held.owner - way.turn) % fabric.size
        due = way.carried[owner][hop]
        leaving = held.part(way.carried[held.owner][hop]).x
        (arriving,) = empty_like([leaving], due.stop - due.start)
        transfer = exchange(fabric, [leaving], ahead, [arriving], behind)
        yield shown
        transfer.wait()
        held = _Visitor(owner, due.start, arriving, way.runs[owner])
        shown = held.part(way.wanted[owner][fabric.rank])
    yield shown


def score_rows(q: Tensor, k: Tensor, bias: Tensor | None, task: Task) -> Tensor:
    """Whole rows of scores, b g r s S; -inf where nothing is seen."""
    groups = k.shape[2]
    rows, queries = _empty_rows(q, groups, task, -torch.inf), _grouped(q, groups)
    for visitor in _visits(k, task):
        rows[..., visitor.columns] = _piece_of_scores(queries, visitor, bias, task)
    return rows


def _piece_of_scores(q: Tensor, visitor: _Visitor, bias: Tensor | None, task: Task) -> Tensor:
    """The scores of s b g r d with a visitor's keys, b g r s t."""
    scores, positions = torch.einsum("sbgrd,tbgd->bgrst", q, _wide(visitor.x)) * task.scale, visitor.positions
    if bias is not None:
        batch, groups, group, local = scores.shape[:4]
        whole = bias.expand(batch, groups * group, local, tokens_of(task))
        scores = scores + whole[..., positions].unflatten(1, (groups, group))
    return scores.masked_fill(_hidden(_positions(task.mine, q), positions, task.mask), -torch.inf)


def _hidden(queries: Tensor, keys: Tensor, mask: Mask) -> Tensor:
    """The pairs that the mask hides, s t."""
    distance = keys[None] - queries[:, None]
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if mask.left is not None:
        hidden |= distance < -mask.left
    if mask.right is not None:
        hidden |= distance > mask.right
    return hidden


def probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    # a row that saw no key has lse -inf and weights 0, not exp(-inf + inf)
    return (scores - lse.masked_fill(lse == -torch.inf, torch.inf)[..., None]).exp_()


def _empty_rows(q: Tensor, groups: int, task: Task, value: float) -> Tensor:
    """b g r s S of one value."""
    local, batch, heads, _ = q.shape
    shape = (batch, groups, heads // groups, local, tokens_of(task))
    return torch.full(shape, value, dtype=accumulator_dtype(q), device=q.device)


def tokens_of(task: Task) -> int:
    return sum(map(length, task.runs))


def _positions(runs: Runs, like: Tensor) -> Tensor:
    pieces = [torch.arange(run.start, run.stop, run.step, device=like.device) for run in runs]
    return torch.cat(pieces) if pieces else torch.arange(0, device=like.device)


def columns_of(task: Task, like: Tensor) -> Tensor:
    """The position of each column in a row of scores."""
    return torch.cat([_positions(runs, like) for runs in task.runs])


def _bias_gradient(rows: Tensor, bias: Tensor, task: Task) -> Tensor:
    """The gradient of scores, added up over the dims in which the bias was broadcast, columns in sequence order."""
    if bias.shape[-1] == 1:
        return rows.flatten(1, 2).sum_to_size(bias.shape).to(bias.dtype)
    summed = rows.flatten(1, 2).sum_to_size((*bias.shape[:3], rows.shape[-1])).to(bias.dtype)
    return torch.empty_like(summed).index_copy_(-1, columns_of(task, bias), summed)


def _wide(x: Tensor) -> Tensor:
    return x.to(accumulator_dtype(x))


def _grouped(x: Tensor, groups: int) -> Tensor:
    # s b (g r) d -> s b g r d
    return _wide(x).unflatten(2, (groups, -1))
