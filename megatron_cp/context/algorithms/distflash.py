"""DISTFLASHATTN: contiguous pieces under a causal mask, where helpers, early ranks without work, help late ones.

In step t rank r attends its queries to the keys of rank r - t. A rank r < t has no such keys and is a helper. Five
ranks with the paper's help (`near`), where q4 k0 is an attention of rank 4's queries to rank 0's keys:

    rank      0           1           2           3           4
    step 0    q0 k0       q1 k1       q2 k2       q3 k3       q4 k4      own keys, causal
    step 1    q4 k0 (h)   q1 k0       q2 k1       q3 k2       q4 k3      (h): rank 0 helps rank 4
    step 2    q3 k0 (h)   q4 k1 (h)   q2 k0       q3 k1       q4 k2

A step's queries and keys are lent by their owners directly, one step ahead; results go straight to the owners.
`distflash_tables` has the tables: with T = p // 2 steps after step 0, and for any p, all ranks have equally many pairs
in every step. Two kinds of help do this, and each pass takes the one that moves fewer bytes. Over all ranks they lend

    near (the paper's)  K and V  T p - T (T + 1) / 2  times, queries  T (T + 1) / 2  times, for an even p T / 2 fewer
    mirrored            K and V  T p - ceil(T / 2)    times, queries  T              times, for an even p 1 / 2 fewer

Lent K and V are 2 U elements, 2 U + 2 Ug with their gradients in the backward pass; lent queries are 2 Uq + Us with
their results, and 3 Uq + 2 Us in the backward pass; U = s b g d and Uq = s b h d in the inputs' dtype, Ug = s b g d and
Us = s b h in the accumulator's. Mirrored help is less where several query heads share a KV head. A causal window takes
the same steps without the hidden pairs. Masks that show later keys need no help: every rank borrows p - 1 times K and
V, or the part that it sees.

Source: Li et al. 2023, arXiv:2310.03294, section 3 (LightSeq); the backward pass sends delta where theirs sends out.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from megatron_cp.comm import Fabric, Handle
from megatron_cp.context.algorithms.distflash_tables import HelpJob, HelpStep, HelpTable, Loan, tables
from megatron_cp.context.circulate import Shard
from megatron_cp.context.delta import delta, stand_in
from megatron_cp.context.merge import SoftmaxMerge, Sum
from megatron_cp.context.returns import Incoming, Outgoing, Returns, empty_like, incoming, incoming_exact
from megatron_cp.context.task import Block, Queries, Saved, Task


def forward(q: Tensor, k: Tensor, v: Tensor, task: Task) -> tuple[Tensor, Saved]:
    """Attend: q [s b h d], k and v [s b g d] of this rank -> out [s b h d].

    Helpers send results in the queries' dtype with float32 row statistics; the owner merges them in float32.
    """
    me, returns = task.fabric.rank, Returns(task.fabric)
    merges = {me: SoftmaxMerge(q, v.shape[3])}
    # 1. choose the kind of help that moves fewer bytes
    table = _cheapest(task, [q, *merges[me].room(slice(0, 1))], [k, v])
    # 2. lend and borrow the queries and keys of the next step during this one
    for work in _steps_at_rank(table, [q], [k, v], task):
        # 3. attend own queries, or as a helper those of a late rank
        (q_here,) = work.tensors
        merge = merges.setdefault(work.job.queries, SoftmaxMerge(q_here, v.shape[3]))
        task.attend(merge, q_here, work.block, work.queries)
        # 4. helpers return results to the owners of the queries, which merge them
        done = work.step.done
        returns.start(_outgoing(done, me, lambda owner: merges.pop(owner).result()), _incoming(done, me, merges[me]))
    returns.finish()
    out, lse = merges[me].result()
    return out, Saved(q, k, v, out, lse)


def backward(dout: Tensor, saved: Saved, task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate: dout [s b h d] -> dq, dk, dv.

    Helpers borrow queries with their output gradients, lse and delta; partial dq, rounded once, and partial dk and dv,
    in float32, go straight to their owner and are added there in float32.
    """
    me, returns = task.fabric.rank, Returns(task.fabric)
    q, k, v, row_delta = saved.q, saved.k, saved.v, delta(saved.out, dout)
    rows, sums = {me: _QueryGradient(saved, dout, Sum(q))}, {me: (Sum(k), Sum(v))}
    # 1. choose the kind of help that moves fewer bytes
    table = _cheapest(task, [q, dout, q, saved.lse, row_delta], [k, v, *Sum(k).room(slice(0, 1), exact=True) * 2])
    # 2. lend and borrow the queries and keys of the next step during this one
    for work in _steps_at_rank(table, [q, dout, saved.lse, row_delta], [k, v], task):
        done, keys, block = work.step.done, work.step.keys, work.block
        # 3. add to the gradients of own queries, or as a helper to those of a late rank
        if work.job.queries not in rows:
            rows[work.job.queries] = _borrowed(work.tensors, block)
        here = rows[work.job.queries]
        dk, dv = sums.setdefault(block.owner, (Sum(block.k), Sum(block.v)))
        task.attend_backward(here.dq, dk, dv, here.dout, here.saved, block, work.queries)
        # 4. return the gradients of what was borrowed to the owners
        returns.start(
            _outgoing(done, me, lambda owner: [rows.pop(owner).dq.result()])
            + _outgoing(keys, me, lambda owner: [part.exact() for part in sums.pop(owner)]),
            _incoming(done, me, rows[me].dq) + _incoming_exact(keys, me, *sums[me]),
        )
    returns.finish()
    dk, dv = sums[me]
    return rows[me].dq.result(), dk.result(), dv.result()


class _QueryGradient(NamedTuple):
    """The tensors that differentiate some queries, and their gradient so far."""

    saved: Saved
    dout: Tensor
    dq: Sum


def _borrowed(tensors: Sequence[Tensor], block: Block) -> _QueryGradient:
    q, dout, lse, row_delta = tensors
    return _QueryGradient(Saved(q, block.k, block.v, stand_in(row_delta, dout), lse), dout, Sum(q))


class _RankStep(NamedTuple):
    """One step at this rank: its job, the tensors with the job's queries, own or borrowed, and the block of keys."""

    step: HelpStep
    job: HelpJob
    tensors: Sequence[Tensor]
    queries: Queries
    block: Block


def _steps_at_rank(
    table: HelpTable, queries: Sequence[Tensor], keys: Sequence[Tensor], task: Task
) -> Iterator[_RankStep]:
    """Yield this rank's steps; tensors for the next one are in flight during the body."""
    me = task.fabric.rank
    q_shards, k_shards = {me: Shard(me, 0, queries)}, {me: Shard(me, 0, keys)}
    for step, following in pairwise((*table.steps, HelpStep())):
        transfer, next_q_shards, next_k_shards = _lend(following, queries, keys, task.fabric)
        job = step.jobs[me]
        q_shard, k_shard = q_shards[job.queries], k_shards[job.keys]
        k, v = k_shard.tensors
        block = Block(job.keys, k_shard.first, k, v)
        yield _RankStep(step, job, q_shard.tensors, Queries(job.queries, job.rows, q_shard.first), block)
        transfer.wait()
        for loan in step.done:
            if loan.worker == me:
                del q_shards[loan.owner]
        q_shards |= next_q_shards
        k_shards = {me: k_shards[me]} | next_k_shards


def _lend(
    step: HelpStep, queries: Sequence[Tensor], keys: Sequence[Tensor], fabric: Fabric
) -> tuple[Handle, dict[int, Shard], dict[int, Shard]]:
    """Send what others borrow of this rank for a step; return the transfer, and by owner what this rank borrows."""
    sends, recvs = [], []
    borrowed: tuple[dict[int, Shard], dict[int, Shard]] = ({}, {})
    for loans, tensors, shards in zip((step.queries, step.keys), (queries, keys), borrowed, strict=True):
        for loan in loans:
            if loan.owner == fabric.rank:
                sends += [(tensor[loan.tokens].contiguous(), loan.worker) for tensor in tensors]
            elif loan.worker == fabric.rank:
                shards[loan.owner] = Shard(loan.owner, loan.tokens.start, empty_like(tensors, loan.size))
                recvs += [(buffer, loan.owner) for buffer in shards[loan.owner].tensors]
    return fabric.exchange(sends, recvs), *borrowed


def _outgoing(loans: Sequence[Loan], me: int, result: Callable[[int], Sequence[Tensor]]) -> list[Outgoing]:
    """Return the results of what this rank borrowed."""
    return [Outgoing(loan.owner, result(loan.owner)) for loan in loans if loan.worker == me]


def _incoming(loans: Sequence[Loan], me: int, *totals: SoftmaxMerge | Sum) -> list[Incoming]:
    """Expect the results of what this rank lent."""
    return [item for loan in loans if loan.owner == me for item in incoming(loan.worker, loan.tokens, *totals)]


def _incoming_exact(loans: Sequence[Loan], me: int, *totals: Sum) -> list[Incoming]:
    """Expect the sums of what this rank lent, not rounded."""
    return [item for loan in loans if loan.owner == me for item in incoming_exact(loan.worker, loan.tokens, *totals)]


def _cheapest(task: Task, queries: Sequence[Tensor], keys: Sequence[Tensor]) -> HelpTable:
    """Return the table that moves the fewest bytes if a lent token moves its rows of these tensors and results."""
    per_query, per_key = _row_bytes(queries), _row_bytes(keys)
    return min(
        tables(task.layout, task.mask).values(), key=lambda table: table.queries * per_query + table.keys * per_key
    )


def _row_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor[0].numel() * tensor.element_size() for tensor in tensors)
