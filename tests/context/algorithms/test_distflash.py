"""DISTFLASHATTN: every rank has the same work in every step, and the cheaper kind of help is taken."""

import pytest
import torch

from megatron_cp.comm import in_process
from megatron_cp.context.algorithms import distflash
from megatron_cp.context.algorithms.distflash_tables import tables
from megatron_cp.context.layouts import cut, layout
from megatron_cp.context.masks import CAUSAL, FULL, Mask
from megatron_cp.context.task import Task
from megatron_cp.context.tiles import tiles
from megatron_cp.kernels.reference import ReferenceKernel
from tests.context.dense import problem
from tests.context.test_backends import assert_equals_dense, sharded

RANKS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 63, 64]
BYTES = 8
LOCAL, BATCH, HEADS, DIM = 12, 2, 8, 8
MASKS = [FULL, CAUSAL, Mask(5, 0), Mask(30, 0), Mask(100, 0), Mask(9, 4), Mask(0, 2), Mask(None, 20)]
HELP = ["near", "mirrored"]


def lent(ranks, help):
    """Over all ranks, how many times one rank's queries are lent and how many times its keys and values."""
    steps, even = ranks // 2, ranks % 2 == 0
    if help == "near":
        return steps * (steps + 1) / 2 - even * steps / 2, steps * ranks - steps * (steps + 1) / 2
    return steps - even / 2, steps * ranks - -(-steps // 2)


def work(job, runs, seen_by):
    """The job's tiles, as tokens of the owners of its queries and keys."""
    for rows, cols, shape in tiles(cut(runs[job.queries], job.rows), runs[job.keys], seen_by):
        assert job.cols.start <= cols.start < cols.stop <= job.cols.stop
        yield slice(rows.start + job.rows.start, rows.stop + job.rows.start), cols, shape


def pairs(rows, cols, shape):
    queries, keys = rows.stop - rows.start, cols.stop - cols.start
    return queries * keys if shape == "full" else queries * (queries + 1) // 2


@pytest.mark.parametrize("seen_by", MASKS, ids=lambda m: f"{m.left}-{m.right}")
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_jobs_cover_mask_exactly_once(ranks, seen_by):
    tokens, runs = 12 * ranks, layout("contiguous", 12 * ranks, ranks)
    distance = torch.arange(tokens)[None] - torch.arange(tokens)[:, None]
    left, right = (tokens if limit is None else limit for limit in seen_by)
    for table in tables(runs, seen_by).values():
        count = torch.zeros(ranks, 12, ranks, 12, dtype=torch.int)
        for job in (job for step in table.steps for job in step.jobs):
            for rows, cols, shape in work(job, runs, seen_by):
                part = count[job.queries, rows, job.keys, cols]
                part += {"full": torch.ones_like, "lower": torch.tril, "upper": torch.triu}[shape](
                    torch.ones_like(part)
                )
        assert torch.equal(count.view(tokens, tokens), ((distance >= -left) & (distance <= right)).int())


@pytest.mark.parametrize("help", HELP)
@pytest.mark.parametrize("ranks", RANKS)
def test_no_rank_waits_in_any_step(ranks, help):
    runs = layout("contiguous", 12 * ranks, ranks)
    table = tables(runs, CAUSAL)[help]
    assert len(table.steps) == ranks // 2 + 1
    for index, step in enumerate(table.steps):
        found = {sum(pairs(*tile) for tile in work(job, runs, CAUSAL)) for job in step.jobs}
        shared = ranks % 2 == 0 and index == ranks // 2
        assert found == {12 * 13 // 2 if index == 0 else 12 * 12 // 2 if shared else 12 * 12}


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 8])
def test_without_a_mask_every_rank_attends_its_own_queries(ranks):
    runs = layout("contiguous", 12 * ranks, ranks)
    (table,) = tables(runs, FULL).values()
    assert all(job.queries == job.worker == rank for step in table.steps for rank, job in enumerate(step.jobs))
    assert (table.queries, table.keys) == (0, ranks * (ranks - 1) * 12)


@pytest.mark.parametrize("help", HELP)
@pytest.mark.parametrize("ranks", RANKS)
def test_loans_are_as_many_as_the_formulas_say(ranks, help):
    table = tables(layout("contiguous", 12 * ranks, ranks), CAUSAL)[help]
    assert (table.queries / 12, table.keys / 12) == lent(ranks, help)


@pytest.mark.parametrize("help", HELP)
@pytest.mark.parametrize("ranks", RANKS)
def test_no_rank_sends_or_receives_more_than_two_blocks_and_some_queries_in_a_step(ranks, help):
    for step in tables(layout("contiguous", 12 * ranks, ranks), CAUSAL)[help].steps:
        for end in ("owner", "worker"):
            for loans, most in ((step.keys, 2), (step.queries, 1), (step.done, 1)):
                ends = [getattr(loan, end) for loan in loans]
                assert max(map(ends.count, ends), default=0) <= most


def sent(ranks, kv_heads, seen_by=CAUSAL):
    """Bytes that all ranks send forward and backward, in the loop's own layout."""
    task = problem(LOCAL * ranks, HEADS, kv_heads, causal=True, dim=DIM, batch=BATCH)
    runs = layout("contiguous", LOCAL * ranks, ranks)

    def body(fabric):
        made = Task(
            fabric=fabric, layout=runs, mask=seen_by, scale=DIM**-0.5, kernel=ReferenceKernel(), heads=(HEADS, kv_heads)
        )
        q, k, v, dout = (x[fabric.rank * LOCAL : (fabric.rank + 1) * LOCAL] for x in task[:4])
        _, saved = distflash.forward(q, k, v, made)
        forward = fabric.sent
        distflash.backward(dout, saved, made)
        return forward, fabric.sent - forward

    return [sum(parts) for parts in zip(*in_process(ranks, body), strict=True)]


def prices(kv_heads):
    """Bytes of one block's keys and values, and of one rank's queries with results: in the forward, the backward."""
    block, queries, statistics = (LOCAL * BATCH * BYTES * n for n in (kv_heads * DIM, HEADS * DIM, HEADS))
    return (2 * block, 2 * queries + statistics), (4 * block, 3 * queries + 2 * statistics)


def total(ranks, help, price):
    return sum(count * each for count, each in zip(lent(ranks, help), reversed(price), strict=True))


@pytest.mark.parametrize("kv_heads", [8, 2, 1])
@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 6, 7, 8, 9])
def test_traffic_is_that_of_the_help_that_moves_less(ranks, kv_heads):
    assert sent(ranks, kv_heads) == [min(total(ranks, help, price) for help in HELP) for price in prices(kv_heads)]


@pytest.mark.parametrize("ranks", [8, 9, 16, 64])
def test_shared_kv_heads_make_a_rank_help_a_single_other(ranks):
    for kv_heads, cheaper, dearer in ((8, "near", "mirrored"), (2, "mirrored", "near"), (1, "mirrored", "near")):
        assert all(total(ranks, cheaper, price) < total(ranks, dearer, price) for price in prices(kv_heads))


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_full_mask_borrows_every_block_and_returns_its_gradients(ranks):
    block = LOCAL * BATCH * BYTES * 2 * DIM
    assert sent(ranks, 2, FULL) == [ranks * (ranks - 1) * 2 * block, ranks * (ranks - 1) * 4 * block]


@pytest.mark.parametrize("window", [1, 7, 12, 13, 24])
def test_window_borrows_only_keys_inside_it(window):
    ranks, token = 6, BATCH * BYTES * 2 * DIM
    # a rank's first query sees `window` earlier keys, as far as there are any
    borrowed = sum(min(window, rank * LOCAL) for rank in range(ranks)) * token
    assert sent(ranks, 2, Mask(window, 0)) == [2 * borrowed, 4 * borrowed]


@pytest.mark.parametrize(("causal", "window"), [(True, (30, 0)), (True, (50, 0)), (True, (80, 0)), (False, (40, 60))])
@pytest.mark.parametrize("ranks", [6, 7, 9])
def test_wide_windows_with_help_equal_dense(ranks, causal, window):
    task = problem(12 * ranks, 4, 1, causal=causal)._replace(window=window)
    assert_equals_dense(in_process(ranks, lambda fabric: sharded(fabric, task, "distflash")), task)


def test_ranks_with_an_odd_number_of_tokens_share_rows_unevenly():
    task = problem(4 * 7, 4, 4, causal=True)
    parts = in_process(4, lambda fabric: sharded(fabric, task, "distflash", outside="contiguous"))
    assert_equals_dense(parts, task)


def test_one_token_per_rank():
    task = problem(4, 2, 1, causal=True)
    parts = in_process(4, lambda fabric: sharded(fabric, task, "distflash", outside="contiguous"))
    assert_equals_dense(parts, task)
