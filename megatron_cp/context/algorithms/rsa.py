"""Ring Self-Attention: the keys travel around the ring until every query has its whole row of scores, then the values.

The only algorithm here that ever holds whole rows of scores, so the one that can show the attention probabilities and
take a dense additive bias. It computes in float32 (float64 for float64) itself, without a kernel.

Traffic per rank, U = s b g d: forward (p-1) U for K and (p-1) U for V; backward the same, V first, and (p-1) U in
float32 each for dK and dV, which go straight to their owners where the paper all-reduces gradients of the whole
sequence and has 2 (p-1) U each. Under a causal mask on the zigzag layout all of this is 3/4, summed over ranks. Memory:
rows of scores, b h s S elements, twice at most while a pass runs; none of them is kept for the backward pass, which
makes them again.

Source: Li et al. 2021, arXiv:2105.13120, section 3.2; there every query sees every key.
"""

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_cp.context.algorithms.ring import GradientReturns, route
from megatron_cp.context.circulate import Shard, circulate
from megatron_cp.context.layouts import Runs, cut, length
from megatron_cp.context.masks import AnyMask, Mask
from megatron_cp.context.merge import Sum, accumulator_dtype
from megatron_cp.context.packing import with_dim
from megatron_cp.context.task import Block, Saved, Task
from megatron_cp.context.tiles import clips
from megatron_cp.errors import Refused

MOST_BYTES = 2**63 - 1
"""Torch counts a tensor's bytes in a signed integer of 64 bits."""


def forward(q: Tensor, k: Tensor, v: Tensor, task: Task) -> tuple[Tensor, Saved]:
    """Attend: q [s b h d], k and v [s b g d] of this rank -> out [s b h d]."""
    return forward_with_bias(q, k, v, None, task)


def backward(dout: Tensor, saved: Saved, task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate: dout [s b h d] -> dq, dk, dv."""
    dq, dk, dv, _ = backward_with_bias(dout, saved, None, task)
    return dq, dk, dv


def forward_with_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, task: Task) -> tuple[Tensor, Saved]:
    """Attend as `forward` with `bias` [b h s S] added to the scores; dims of size 1 are broadcast."""
    # 1. ring of K: whole rows of scores
    scores = score_rows(q, k, bias, task)
    # 2. softmax over whole rows
    lse = scores.logsumexp(-1)
    weights = whole_rows(scores, lse)
    # 3. ring of V: the weighted sum of values
    total = Sum(with_dim(q, v.shape[3]))
    for piece in _circulating(v, task):
        # b g r s t, t b g d -> s b (g r) d
        part = torch.einsum("bgrst,tbgd->sbgrd", weights[..., piece.columns], _wide(piece.x))
        total.add(slice(None), part.flatten(2, 3))
    out = total.result()
    # b g r s -> s b (g r)
    return out, Saved(q, k, v, out, lse.permute(3, 0, 1, 2).flatten(2, 3))


def backward_with_bias(
    dout: Tensor, saved: Saved, bias: Tensor | None, task: Task
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Differentiate: P = exp(S - lse), dP = dO V', dS = P (dP - rowsum(O dO)); dP by whole rows, the rest by pieces.

    dbias is None without a bias.
    """
    groups = saved.k.shape[2]
    q, out, dout_ = (_grouped(x, groups) for x in (saved.q, saved.out, dout))
    # s b (g r) -> b g r s
    lse, delta = (
        x.unflatten(2, (groups, -1)).permute(1, 2, 3, 0) for x in (saved.lse, (out * dout_).sum(-1).flatten(2))
    )
    # 1. ring of V: whole rows of dP
    rows = _empty_rows(saved.q, groups, task, 0.0)
    for piece in _circulating(saved.v, task):
        rows[..., piece.columns] = torch.einsum("sbgrd,tbgd->bgrst", dout_, _wide(piece.x))
    dq, dk, dv = Sum(saved.q), Sum(saved.k), Sum(saved.v)
    mine = Block(task.fabric.rank, 0, saved.k, saved.v, task.mine)
    returns = GradientReturns(mine, dk, dv, route(task.layout, task.mask), task.fabric)
    # 2. ring of K
    for piece in _circulating(saved.k, task):
        block = piece.block(saved.v.shape[3])
        dk_here, dv_here = returns.sums(block)
        # 3. make P again, and dS from it
        weights = probabilities(_piece_of_scores(q, piece, bias, task), lse)
        dscores = weights * (rows[..., piece.columns] - delta[..., None])
        # 4. add to dq here, and to this rank's part of the piece's dk and dv
        dq.add(slice(None), torch.einsum("bgrst,tbgd->sbgrd", dscores, _wide(piece.x)).flatten(2, 3) * task.scale)
        dk_here.add(slice(None), torch.einsum("bgrst,sbgrd->tbgd", dscores, q) * task.scale)
        dv_here.add(slice(None), torch.einsum("bgrst,sbgrd->tbgd", weights, dout_))
        # 5. return that part to the owner of the piece
        returns.start(block, dk_here, dv_here)
        rows[..., piece.columns] = dscores
    returns.finish()
    return dq.result(), dk.result(), dv.result(), None if bias is None else _bias_gradient(rows, bias, task)


class _Piece(NamedTuple):
    """Keys or values with the tokens of rank `owner`, at its positions `runs`, from its local token `first` on."""

    owner: int
    first: int
    x: Tensor
    runs: Runs

    @property
    def columns(self) -> slice:
        """The tokens' columns in a row of scores: rank after rank, all ranks have equally many."""
        start = self.owner * length(self.runs) + self.first
        return slice(start, start + len(self.x))

    @property
    def held(self) -> Runs:
        """The tokens' positions."""
        return cut(self.runs, slice(self.first, self.first + len(self.x)))

    def block(self, value_dim: int) -> Block:
        """Return these keys as a block, for the gradients of K and V; its values have a shape only."""
        return Block(self.owner, self.first, self.x, with_dim(self.x, value_dim), self.runs)


def _circulating(x: Tensor, task: Task) -> Iterator[_Piece]:
    """Yield this rank's x, then the part of every other's that it sees; the next one is in flight during the body."""
    me, way = task.fabric.rank, route(task.layout, task.mask)
    for (shard,) in circulate([Shard(me, 0, (x,))], [way], task.fabric):
        owner, first, (here,) = shard
        if owner != me:
            seen = way.wanted[owner][me]
            first, (here,) = seen.start, shard.part(seen)
        yield _Piece(owner, first, here, way.layout[owner])


def score_rows(q: Tensor, k: Tensor, bias: Tensor | None, task: Task) -> Tensor:
    """Return whole rows of scores, b g r s S; -inf where the mask hides a key."""
    groups = k.shape[2]
    rows, queries = _empty_rows(q, groups, task, -torch.inf), _grouped(q, groups)
    for piece in _circulating(k, task):
        rows[..., piece.columns] = _piece_of_scores(queries, piece, bias, task)
    return rows


def _piece_of_scores(q: Tensor, piece: _Piece, bias: Tensor | None, task: Task) -> Tensor:
    """Return the scores of queries s b g r d with a piece's keys, b g r s t."""
    scores = torch.einsum("sbgrd,tbgd->bgrst", q, _wide(piece.x)) * task.scale
    if bias is not None:
        batch, groups, group, local = scores.shape[:4]
        whole = bias.expand(batch, groups * group, local, tokens_of(task))
        scores = scores + whole[..., _positions(piece.held, q)].unflatten(1, (groups, group))
    return scores.masked_fill(_hidden(task.mine, piece.held, task.mask, q), -torch.inf)


def _hidden(q_runs: Runs, kv_runs: Runs, mask: AnyMask, like: Tensor) -> Tensor:
    """Return the pairs that the mask hides, s t."""
    queries, keys = _positions(q_runs, like), _positions(kv_runs, like)
    if isinstance(mask, Mask):
        return _outside(queries, keys, mask)
    hidden = torch.ones(len(queries), len(keys), dtype=torch.bool, device=like.device)
    for clip in clips(q_runs, kv_runs, mask):
        rows, cols = clip.local
        hidden[rows, cols] &= _outside(queries[rows], keys[cols], clip.piece.band)
    return hidden


def _outside(queries: Tensor, keys: Tensor, band: Mask) -> Tensor:
    distance = keys[None] - queries[:, None]
    outside = torch.zeros_like(distance, dtype=torch.bool)
    if band.left is not None:
        outside |= distance < -band.left
    if band.right is not None:
        outside |= distance > band.right
    return outside


def probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    # a row that saw no key has lse -inf and weights 0, not exp(-inf + inf)
    return (scores - lse.masked_fill(lse == -torch.inf, torch.inf)[..., None]).exp_()


def whole_rows(scores: Tensor, lse: Tensor) -> Tensor:
    """Return weights that add up to 1, which those by lse do not where scores are so large that lse is rounded."""
    weights = probabilities(scores, lse)
    total = weights.sum(-1, keepdim=True)
    return weights.div_(total.masked_fill_(total == 0, 1))


def _empty_rows(q: Tensor, groups: int, task: Task, value: float) -> Tensor:
    """Return rows b g r s S of one value."""
    local, batch, heads, _ = q.shape
    shape = (batch, groups, heads // groups, local, tokens_of(task))
    dtype = accumulator_dtype(q)
    if (size := prod(shape) * dtype.itemsize) > MOST_BYTES:
        raise Refused(
            f"'rsa' holds whole rows of scores, {size:.3g} bytes on a rank, and tensors end at {MOST_BYTES:.3g}; "
            "take more ranks, fewer tokens or backend 'ring'"
        )
    return torch.full(shape, value, dtype=dtype, device=q.device)


def tokens_of(task: Task) -> int:
    return sum(map(length, task.layout))


def _positions(runs: Runs, like: Tensor) -> Tensor:
    pieces = [torch.arange(run.start, run.stop, run.step, device=like.device) for run in runs]
    return torch.cat(pieces) if pieces else torch.arange(0, device=like.device)


def columns_of(task: Task, like: Tensor) -> Tensor:
    """Return the position of each column in a row of scores."""
    return torch.cat([_positions(runs, like) for runs in task.layout])


def _bias_gradient(rows: Tensor, bias: Tensor, task: Task) -> Tensor:
    """Add the gradient of scores up over the dims in which the bias was broadcast; columns in sequence order."""
    if bias.shape[-1] == 1:
        return rows.flatten(1, 2).sum_to_size(bias.shape).to(bias.dtype)
    summed = rows.flatten(1, 2).sum_to_size((*bias.shape[:3], rows.shape[-1])).to(bias.dtype)
    return torch.empty_like(summed).index_copy_(-1, columns_of(task, bias), summed)


def _wide(x: Tensor) -> Tensor:
    return x.to(accumulator_dtype(x))


def _grouped(x: Tensor, groups: int) -> Tensor:
    # s b (g r) d -> s b g r d
    return _wide(x).unflatten(2, (groups, -1))
