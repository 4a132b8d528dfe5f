"""The tables of DISTFLASHATTN: each rank's job in each step, and the tokens that ranks lend for it. Pure.

The paper's steps, causal:
1. In step t rank r attends its queries to the keys of rank r - t.
2. A rank r < t has no such keys and is a helper: it attends queries of a late rank.
3. After p // 2 steps all pairs are done.
For an even p the last pairs come up twice in the last step, at the owner of the queries and at its helper; these share
the query rows, so that no rank waits. Four ranks with the paper's help, q3 k0 for queries of rank 3 and keys of rank 0:

    rank      0           1           2           3
    step 0    q0 k0       q1 k1       q2 k2       q3 k3
    step 1    q3 k0 (h)   q1 k0       q2 k1       q3 k2      (h): a helper
    step 2    q2 k0 (h)   q3 k1 (h)   q2 k0       q3 k1      half of the rows each

Source: Li et al. 2023, arXiv:2310.03294, section 3.2; the shared rows and the mirrored table are additions.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

from megatron_cp.context import cache_sizes
from megatron_cp.context.layouts import Layout, cut, length
from megatron_cp.context.masks import AnyMask
from megatron_cp.context.remembered import remembered
from megatron_cp.context.tiles import hull, seen


class HelpJob(NamedTuple):
    """The task of rank `worker` in a step: attend tokens `rows` of rank `queries` to tokens `cols` of rank `keys`."""

    worker: int
    queries: int
    keys: int
    rows: slice
    cols: slice

    @property
    def idle(self) -> bool:
        """True if the job has no rows."""
        return self.rows.start == self.rows.stop


class Loan(NamedTuple):
    """Tokens of rank `owner` that `worker` borrows."""

    owner: int
    worker: int
    tokens: slice

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self.tokens.stop - self.tokens.start


class HelpStep(NamedTuple):
    """Every rank's job, and the loans for it.

    keys:    keys and values lent for this step alone
    queries: queries lent from this step on
    done:    lent queries whose results are returned after this step
    """

    jobs: tuple[HelpJob, ...] = ()
    keys: tuple[Loan, ...] = ()
    queries: tuple[Loan, ...] = ()
    done: tuple[Loan, ...] = ()


class HelpTable(NamedTuple):
    """The steps of one attention."""

    steps: tuple[HelpStep, ...]

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
    """The paper's help: queries of the rank `step` before the helper, around the end, with the helper's own keys."""
    return rank - step + ranks, rank


def mirrored(rank: int, step: int, ranks: int) -> Pair:
    """Help for a single rank, as far from the end as the helper is from the start, with borrowed keys."""
    return ranks - 1 - rank, step - 1 - rank


def around(rank: int, step: int, ranks: int) -> Pair:
    """No help: the rank's own queries against later keys."""
    return rank, rank - step + ranks


@remembered(cache_sizes.LAYOUTS)
def tables(layout: Layout, mask: AnyMask) -> dict[str, HelpTable]:
    """Return tables that compute every unmasked pair of a contiguous layout exactly once, by the kind of help."""
    ranks = len(layout)
    if not mask.causal:
        return {"around": _table(_steps(layout, mask, ranks, around))}
    # 3. after p // 2 steps all pairs are done; for an even p the last step has its pairs twice, with half of the rows
    steps, shared = ranks // 2 + 1, ranks // 2 if ranks % 2 == 0 else None
    return {help.__name__: _table(_steps(layout, mask, steps, help, shared)) for help in (near, mirrored)}


def _steps(layout: Layout, mask: AnyMask, count: int, help: Help, shared: int | None = None) -> list[list[HelpJob]]:
    """List the jobs of each step by worker, without steps in which all are idle; rows are shared in step `shared`."""
    ranks = len(layout)
    steps = []
    for step in range(count):
        jobs = []
        for rank in range(ranks):
            # 1. own queries with earlier keys, or 2. as a helper those of a late rank
            queries, keys = (rank, rank - step) if rank >= step else help(rank, step, ranks)
            tokens = length(layout[queries])
            rows = slice(0, tokens)
            if step == shared:
                rows = slice(tokens // 2, tokens) if queries == rank else slice(0, tokens // 2)
            jobs.append(_job(rank, queries, keys, rows, layout, mask))
        steps.append(jobs)
    return [jobs for jobs in steps if not all(job.idle for job in jobs)]


def _job(worker: int, queries: int, keys: int, rows: slice, layout: Layout, mask: AnyMask) -> HelpJob:
    """Return the job without the rows that see none of the keys and without the keys that none of the rows see."""
    mine, theirs = cut(layout[queries], rows), layout[keys]
    # a window hides more than the causal mask, of which the steps know
    cols, seeing = seen(mine, theirs, mask), seen(theirs, mine, mask.mirrored)
    if cols.start == cols.stop:
        return HelpJob(worker, worker, worker, cols, cols)
    return HelpJob(worker, queries, keys, slice(rows.start + seeing.start, rows.start + seeing.stop), cols)


def _table(steps: list[list[HelpJob]]) -> HelpTable:
    """Add the loans to the jobs; a worker keeps queries from its first job with them to its last."""
    # rows of each step by owner and worker
    stays: dict[Pair, dict[int, slice]] = defaultdict(dict)
    for index, jobs in enumerate(steps):
        for job in jobs:
            if job.queries != job.worker:
                stays[job.queries, job.worker][index] = job.rows
    lent = [(min(rows), max(rows), Loan(*pair, hull(tuple(rows.values())))) for pair, rows in stays.items()]
    return HelpTable(
        tuple(
            HelpStep(
                tuple(jobs),
                tuple(Loan(job.keys, job.worker, job.cols) for job in jobs if job.keys != job.worker),
                tuple(loan for first, _, loan in lent if first == index),
                tuple(loan for _, last, loan in lent if last == index),
            )
            for index, jobs in enumerate(steps)
        )
    )
