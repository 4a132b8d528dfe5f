"""DISTFLASHATTN: contiguous pieces under a causal mask, where early ranks that run out of work help late ones.

What a step needs is lent by its owner directly, one step ahead; results go straight home. `lending` has the tables of
jobs: with T = p // 2 steps after the first one, and for any p, all ranks have equally many pairs in every step. Two
kinds of help do this, and each pass takes the one that moves fewer bytes. Over all ranks they lend

    near (the paper's)  K and V  T p - T (T + 1) / 2  times, queries  T (T + 1) / 2  times, for an even p T / 2 fewer
    mirrored            K and V  T p - ceil(T / 2)    times, queries  T              times, for an even p 1 / 2 fewer

Lent K and V are 2 U elements, 4 U with their gradients in the backward pass; lent queries are 2 Uq + Us with their
results, and 3 Uq + 2 Us in the backward pass; U = s b g d and Uq = s b h d in the inputs' dtype, Us = s b h in the
accumulator's. Mirrored help is less where several query heads share a KV head. A causal window takes the same steps
without what it hides. Masks that show later keys need no help: every rank borrows p - 1 times K and V, or what it sees.

Source: Li et al. 2023, arXiv:2310.03294, section 3 (LightSeq); the backward pass sends delta where theirs sends out.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from megatron_cp.comm import Fabric, Handle
from megatron_cp.context.algorithms.distflash_tables import Job, Loan, Step, Table, tables
from megatron_cp.context.delta import delta, stand_in
from megatron_cp.context.merge import SoftmaxMerge, Sum
from megatron_cp.context.returns import Due, Leaving, Returns, empty_like
from megatron_cp.context.task import Block, Queries, Saved, Task


def forward(q: Tensor, k: Tensor, v: Tensor, task: Task) -> tuple[Tensor, Saved]:
    """q [s b h d], k and v [s b g d] of this rank -> out [s b h d].

    Helpers send results in the queries' dtype with float32 row statistics; the owner merges them in float32.
    """
    me, home = task.fabric.rank, Returns(task.fabric)
    merges = {me: SoftmaxMerge(q)}
    table = _cheapest(task, [q, *merges[me].room(slice(0, 1))], [k, v])
    for shift in _shifts(table, [q], [k, v], task):
        (guests,) = shift.guests
        task.attend(merges.setdefault(shift.job.queries, SoftmaxMerge(guests)), guests, shift.block, shift.queries)
        done = shift.step.done
        home.start(_leaving(done, me, lambda owner: merges.pop(owner).result()), _due(done, me, merges[me]))
    home.finish()
    out, lse = merges[me].result()
    return out, Saved(q, k, v, out, lse)


def backward(dout: Tensor, saved: Saved, task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """dout [s b h d] -> dq, dk, dv.

    Helpers borrow queries with their output gradients, lse and delta; partial dq, dk and dv go straight to their owner,
    rounded once, and are added there in float32.
    """
    me, home = task.fabric.rank, Returns(task.fabric)
    q, k, v, row_delta = saved.q, saved.k, saved.v, delta(saved.out, dout)
    works, sums = {me: _Work(saved, dout, Sum(q))}, {me: (Sum(k), Sum(v))}
    table = _cheapest(task, [q, dout, q, saved.lse, row_delta], [k, v, k, v])
    for shift in _shifts(table, [q, dout, saved.lse, row_delta], [k, v], task):
        done, keys, block = shift.step.done, shift.step.keys, shift.block
        if shift.job.queries not in works:
            works[shift.job.queries] = _work_for(shift.guests, block)
        work = works[shift.job.queries]
        dk, dv = sums.setdefault(block.owner, (Sum(block.k), Sum(block.v)))
        task.attend_backward(work.dq, dk, dv, work.dout, work.saved, block, shift.queries)
        home.start(
            _leaving(done, me, lambda owner: [works.pop(owner).dq.result()])
            + _leaving(keys, me, lambda owner: [part.result() for part in sums.pop(owner)]),
            _due(done, me, works[me].dq) + _due(keys, me, *sums[me]),
        )
    home.finish()
    dk, dv = sums[me]
    return works[me].dq.result(), dk.result(), dv.result()


class _Work(NamedTuple):
    """What the backward pass needs of some queries, and their gradient so far."""

    saved: Saved
    dout: Tensor
    dq: Sum


def _work_for(guests: Sequence[Tensor], block: Block) -> _Work:
    q, dout, lse, row_delta = guests
    return _Work(Saved(q, block.k, block.v, stand_in(row_delta, dout), lse), dout, Sum(q))


class _Shift(NamedTuple):
    """One step at this rank: its job and the tensors for it; guests hold the job's queries, or this rank's own."""

    step: Step
    job: Job
    guests: Sequence[Tensor]
    queries: Queries
    block: Block


class _Held(NamedTuple):
    """Tensors with some rank's tokens from `first` on."""

    first: int
    tensors: Sequence[Tensor]


def _shifts(table: Table, queries: Sequence[Tensor], keys: Sequence[Tensor], task: Task) -> Iterator[_Shift]:
    """All steps; what the next one needs is in flight during the body."""
    me = task.fabric.rank
    guests, blocks = {me: _Held(0, queries)}, {me: _Held(0, keys)}
    for step, following in pairwise((*table.steps, Step())):
        transfer, next_guests, next_blocks = _lend(following, queries, keys, task.fabric)
        job = step.jobs[me]
        guest, (first, (k, v)) = guests[job.queries], blocks[job.keys]
        theirs = Queries(job.queries, job.rows, guest.first)
        yield _Shift(step, job, guest.tensors, theirs, Block(job.keys, first, k, v))
        transfer.wait()
        for loan in step.done:
            if loan.worker == me:
                del guests[loan.owner]
        guests |= next_guests
        blocks = {me: blocks[me]} | next_blocks


def _lend(
    step: Step, queries: Sequence[Tensor], keys: Sequence[Tensor], fabric: Fabric
) -> tuple[Handle, dict[int, _Held], dict[int, _Held]]:
    """Send what others borrow of this rank for a step; what this rank borrows, by owner, is there after the wait."""
    sends, recvs = [], []
    borrowed: tuple[dict[int, _Held], dict[int, _Held]] = ({}, {})
    for loans, tensors, held in zip((step.queries, step.keys), (queries, keys), borrowed, strict=True):
        for loan in loans:
            if loan.owner == fabric.rank:
                sends += [(tensor[loan.tokens].contiguous(), loan.worker) for tensor in tensors]
            elif loan.worker == fabric.rank:
                held[loan.owner] = _Held(loan.tokens.start, empty_like(list(tensors), loan.size))
                recvs += [(buffer, loan.owner) for buffer in held[loan.owner].tensors]
    return fabric.exchange(sends, recvs), *borrowed


def _leaving(loans: Sequence[Loan], me: int, result: Callable[[int], Sequence[Tensor]]) -> list[Leaving]:
    """Results of what this rank had borrowed."""
    return [Leaving(loan.owner, result(loan.owner)) for loan in loans if loan.worker == me]


def _due(loans: Sequence[Loan], me: int, *totals: SoftmaxMerge | Sum) -> list[Due]:
    """Results of what this rank had lent."""
    return [
        Due(loan.worker, loan.tokens, total.room(loan.tokens), total.add)
        for loan in loans
        if loan.owner == me
        for total in totals
    ]


def _cheapest(task: Task, queries: Sequence[Tensor], keys: Sequence[Tensor]) -> Table:
    """The table that moves the fewest bytes when lending a token moves its rows of these tensors, results included."""
    per_query, per_key = _row_bytes(queries), _row_bytes(keys)
    return min(
        tables(task.runs, task.mask).values(), key=lambda table: table.queries * per_query + table.keys * per_key
    )


def _row_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor[0].numel() * tensor.element_size() for tensor in tensors)
