"""Stripes of several tokens: the striped layout in blocks, through all that reads positions."""

import pytest
import torch

from megatron_cp.comm import in_process
from megatron_cp.context.attend import attend, plan
from megatron_cp.context.layouts import gathered, indices, layout, length, moves
from megatron_cp.context.masks import CAUSAL, FULL, Mask
from megatron_cp.context.tiles import tiles
from megatron_cp.context.trace.events import Post, Problem
from megatron_cp.context.trace.proof import prove, small
from megatron_cp.context.trace.record import record
from megatron_cp.grid import Grid
from tests.context.dense import problem
from tests.context.test_backends import assert_equals_dense, sharded
from tests.context.test_tiles import pairs, visible

STRIPES = [1, 2, 4]
RANKS = [1, 2, 3, 5]


def local_positions(runs):
    return [position for run in runs for position in run]


@pytest.mark.parametrize("stripe", [1, 2, 4, 8])
@pytest.mark.parametrize("ranks", RANKS)
def test_blocks_are_dealt_in_turn(ranks, stripe):
    owned = [indices("striped", 16 * ranks, ranks, rank, stripe) for rank in range(ranks)]
    for rank, positions in enumerate(owned):
        assert positions == [position for position in range(16 * ranks) if position // stripe % ranks == rank]


@pytest.mark.parametrize("seen_by", [FULL, CAUSAL, Mask(7, 0), Mask(3, 9), Mask(0, None)], ids=str)
@pytest.mark.parametrize("stripe", [2, 4, 8])
@pytest.mark.parametrize("ranks", RANKS)
def test_tiles_of_stripes_cover_mask_exactly_once(ranks, stripe, seen_by):
    owned = layout("striped", 16 * ranks, ranks, stripe)
    for queries in owned:
        for keys in (*owned, gathered(owned)[0]):
            found = tiles(queries, keys, seen_by)
            assert sorted(pair for tile in found for pair in pairs(tile)) == visible(queries, keys, seen_by)


@pytest.mark.parametrize("name", ["zigzag", "contiguous", "striped"])
@pytest.mark.parametrize("stripe", STRIPES)
@pytest.mark.parametrize("ranks", RANKS)
def test_moves_bring_tokens_to_stripes_and_back(ranks, stripe, name):
    other, stripes = layout(name, 24 * ranks, ranks), layout("striped", 24 * ranks, ranks, stripe)
    for before, after in ((other, stripes), (stripes, other)):
        have, got = [local_positions(runs) for runs in before], [[None] * 24 for _ in range(ranks)]
        for move in moves(before, after):
            got[move.dst][move.dst_tokens] = have[move.src][move.src_tokens]
        assert got == [local_positions(runs) for runs in after]


def test_a_relayout_is_one_message_to_each_rank():
    recorded = record(Problem("striped", 4, 256, 4, 4, stripe=4))
    posts = [event for event, _ in recorded.forward.steps[0] if isinstance(event, Post)]
    assert [message.peer for message in posts[0].sends] == [message.peer for message in posts[-1].sends] == [1, 2, 3]


@pytest.mark.parametrize("window", [None, (9, None)])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("stripe", STRIPES)
@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
def test_striped_equals_dense(ranks, stripe, causal, window):
    task = problem(24 * ranks, 4, 2, causal=causal)._replace(window=window)
    assert_equals_dense(in_process(ranks, lambda fabric: sharded(fabric, task, "striped", stripe=stripe)), task)


@pytest.mark.parametrize("stripe", [2, 4])
@pytest.mark.parametrize("backend", ["ulysses", "usp", "all-gather", "zigzag", "bidirectional", "ring", "striped"])
def test_backend_takes_tokens_in_stripes(backend, stripe):
    task, grid = problem(64, 8, 2, causal=True), Grid(2, 2) if backend == "usp" else None

    def body(fabric):
        mine = torch.tensor(indices("striped", 64, 4, fabric.rank, stripe))
        axes = {axis: fabric.subset(grid.members(axis, fabric.rank)) for axis in ("inner", "outer")} if grid else {}
        made = plan(backend, cp=fabric, kernel="reference", layout="striped", stripe=stripe, **axes)
        q, k, v = (x[mine].requires_grad_() for x in task[:3])
        out = attend(q, k, v, made)
        return mine, (out.detach(), *torch.autograd.grad(out, (q, k, v), task.dout[mine]))

    assert_equals_dense(in_process(4, body), task)


@pytest.mark.parametrize("chunks", [1, 2])
def test_chunks_of_stripes_equal_dense(chunks):
    task = problem(48, 4, 2, causal=True)
    assert_equals_dense(in_process(3, lambda fabric: sharded(fabric, task, "striped", stripe=4, chunks=chunks)), task)


@pytest.mark.parametrize("chunks", [None, 3])
@pytest.mark.parametrize("stripe", [1, 2, 64])
def test_stripes_are_proven(stripe, chunks):
    proof = prove(small(Problem("striped", 4, 2**14, 4, 2, stripe=stripe, chunks=chunks)))
    assert proof.covered, proof.problem


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"backend": "striped", "stripe": 0}, "1 or more, got 0"),
        ({"backend": "zigzag", "stripe": 4}, "got stripe = 4 with backend 'zigzag' on layout 'zigzag'; use backend"),
    ],
)
def test_stripes_that_make_no_sense_are_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        plan(**choices)


def test_a_length_that_stripes_do_not_divide_is_refused_before_anything_is_sent():
    def body(fabric):
        x = torch.zeros(12, 1, 2, 8, dtype=torch.float64)
        message = r"divisible by context_parallel_size \* stripe = 24, got S = 36; pad to 48"
        with pytest.raises(ValueError, match=message):
            attend(x, x, x, plan("striped", cp=fabric, stripe=8))
        return fabric.sent

    assert in_process(3, body) == [0, 0, 0]
    assert length(layout("striped", 48, 3, 8)[0]) == 16
