"""Who attends to what in which step, and who lends it, when ranks help each other: the tables of DISTFLASHATTN. Pure.

In step t rank r attends its queries to the keys of rank r - t; under a causal mask a rank r < t has no such keys and
helps a late rank. After p // 2 steps all pairs are done. For an even p the last pairs come up twice in the
last step, at the owner of the queries and at its helper; these share the query rows, so that no rank ever waits.

Source: Li et al. 2023, arXiv:2310.03294, section 3.2; the shared rows and the mirrored table are additions.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from megatron_cp.context.layouts import Layout, cut, length
from megatron_cp.context.masks import Mask
from megatron_cp.context.tiles import hull, seen


class Job(NamedTuple):
    """What `worker` does in a step: attend tokens `rows` of rank `queries` to tokens `cols` of rank `keys`."""

    worker: int
    queries: int
    keys: int
    rows: slice
    cols: slice

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return self.rows.start == self.rows.stop


class Loan(NamedTuple):
    """Tokens of rank `owner` that `worker` borrows."""

    owner: int
    worker: int
    tokens: slice

    @property
    def size(self) -> int:
        """How many tokens are lent."""
        return self.tokens.stop - self.tokens.start


class Step(NamedTuple):
    """Every rank's job, and what is lent for it.

    keys:    for this step alone
    queries: from this step on
    done:    the queries whose results go home after this step
    """

    jobs: tuple[Job, ...] = ()
    keys: tuple[Loan, ...] = ()
    queries: tuple[Loan, ...] = ()
    done: tuple[Loan, ...] = ()


class Table(NamedTuple):
    """The steps of one attention."""

    steps: tuple[Step, ...]

    @property
    def queries(self) -> int:
        """Tokens whose queries are lent, over all ranks."""
        return sum(loan.size for step in self.steps for loan in step.queries)

    @property
    def keys(self) -> int:
        """Tokens whose keys and values are lent, over all ranks."""
        return sum(loan.size for step in self.steps for loan in step.keys)


Pair = tuple[int, int]
Help = Callable[[int, int, int], Pair]


def near(rank: int, step: int, ranks: int) -> Pair:
    """The paper's help: queries of the rank `step` before this one, around the end, against the helper's own keys."""
    return rank - step + ranks, rank


def mirrored(rank: int, step: int, ranks: int) -> Pair:
    """Help for a single rank, the one as far from the end as the helper is from the start, against borrowed keys."""
    return ranks - 1 - rank, step - 1 - rank


def around(rank: int, step: int, ranks: int) -> Pair:
    """No help: the rank's own queries against later keys."""
    return rank, rank - step + ranks


@cache
def tables(runs: Layout, mask: Mask) -> dict[str, Table]:
    """The tables that compute every unmasked pair of a contiguous layout exactly once, by the kind of help."""
    ranks = len(runs)
    if not mask.causal:
        return {"around": _table(_steps(runs, mask, ranks, around))}
    steps, shared = ranks // 2 + 1, ranks // 2 if ranks % 2 == 0 else None
    return {help.__name__: _table(_steps(runs, mask, steps, help, shared)) for help in (near, mirrored)}


def _steps(runs: Layout, mask: Mask, count: int, help: Help, shared: int | None = None) -> list[list[Job]]:
    """The jobs of each step by worker, without steps in which all ranks are idle; rows are shared in step `shared`."""
    ranks = len(runs)
    steps = []
    for step in range(count):
        jobs = []
        for rank in range(ranks):
            queries, keys = (rank, rank - step) if rank >= step else help(rank, step, ranks)
            tokens = length(runs[queries])
            rows = slice(0, tokens)
            if step == shared:
                rows = slice(tokens // 2, tokens) if queries == rank else slice(0, tokens // 2)
            jobs.append(_job(rank, queries, keys, rows, runs, mask))
        steps.append(jobs)
    return [jobs for jobs in steps if not all(job.idle for job in jobs)]


def _job(worker: int, queries: int, keys: int, rows: slice, runs: Layout, mask: Mask) -> Job:
    """The job without the rows that see none of the keys and without the keys that none of the rows see."""
    mine, theirs = cut(runs[queries], rows), runs[keys]
    cols, seeing = seen(mine, theirs, mask), seen(theirs, mine, mask.mirrored)
    if cols.start == cols.stop:
        return Job(worker, worker, worker, cols, cols)
    return Job(worker, queries, keys, slice(rows.start + seeing.start, rows.start + seeing.stop), cols)


def _table(steps: list[list[Job]]) -> Table:
    """The jobs with what is lent for them; a rank keeps queries from its first job with them to its last."""
    stays: dict[Pair, dict[int, slice]] = defaultdict(dict)
    for index, jobs in enumerate(steps):
        for job in jobs:
            if job.queries != job.worker:
                stays[job.queries, job.worker][index] = job.rows
    lent = [(min(rows), max(rows), Loan(*pair, hull(tuple(rows.values())))) for pair, rows in stays.items()]
    return Table(
        tuple(
            Step(
                tuple(jobs),
                tuple(Loan(job.keys, job.worker, job.cols) for job in jobs if job.keys != job.worker),
                tuple(loan for first, _, loan in lent if first == index),
                tuple(loan for _, last, loan in lent if last == index),
            )
            for index, jobs in enumerate(steps)
        )
    )
