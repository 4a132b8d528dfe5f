"""TokenRing: only queries and their results travel, and the output's stand-in has its delta."""

import pytest
import torch

from megatron_cp.comm import in_process
from megatron_cp.context.algorithms.ring import route
from megatron_cp.context.delta import delta, stand_in
from megatron_cp.context.layouts import layout
from megatron_cp.context.masks import CAUSAL, FULL, Mask
from tests.context.dense import problem
from tests.context.test_backends import sharded

RANKS = [2, 3, 4, 5, 8]
BYTES = 8
LOCAL, BATCH, HEADS, DIM = 12, 2, 8, 8
QUERIES = LOCAL * BATCH * HEADS * DIM * BYTES
STATISTICS = LOCAL * BATCH * HEADS * BYTES


def sent(ranks, *, causal, kv_heads=2, window=None, outside="zigzag"):
    """Bytes that each rank sends, forward and backward."""
    task = problem(LOCAL * ranks, HEADS, kv_heads, causal=causal, dim=DIM, batch=BATCH)._replace(window=window)

    def body(fabric):
        sharded(fabric, task, "tokenring", outside=outside)
        return fabric.sent

    return in_process(ranks, body)


# q; out, lse; q, dout, lse, delta; dq
EVERYTHING = QUERIES + (QUERIES + STATISTICS) + (2 * QUERIES + 2 * STATISTICS) + QUERIES


@pytest.mark.parametrize("kv_heads", [8, 2, 1])
@pytest.mark.parametrize("ranks", RANKS)
def test_all_queries_visit_all_ranks_whatever_the_kv_heads(ranks, kv_heads):
    assert sent(ranks, causal=False, kv_heads=kv_heads) == [(ranks - 1) * EVERYTHING] * ranks


@pytest.mark.parametrize("ranks", RANKS)
def test_causal_zigzag_sends_three_quarters(ranks):
    assert sum(sent(ranks, causal=True)) == 0.75 * ranks * (ranks - 1) * EVERYTHING


@pytest.mark.parametrize("ranks", RANKS)
def test_causal_contiguous_sends_half(ranks):
    assert sum(sent(ranks, causal=True, outside="contiguous")) == 0.5 * ranks * (ranks - 1) * EVERYTHING


def test_window_keeps_at_home_the_queries_that_no_other_rank_needs():
    # the first 5 queries of each of the last 3 ranks see keys of the rank before, and no others
    assert sum(sent(4, causal=True, window=(5, 0), outside="contiguous")) == 3 * EVERYTHING * 5 / LOCAL


@pytest.mark.parametrize("ranks", RANKS)
def test_causal_zigzag_queries_turn_towards_rank_0_as_keys_do(ranks):
    runs = layout("zigzag", 4 * ranks, ranks)
    keys, queries = route(runs, CAUSAL), route(runs, CAUSAL.mirrored)
    assert keys.volume == queries.volume
    # there the early half of the queries, which sees no late keys, stops
    assert ranks == 2 or keys.turn == queries.turn == -1


@pytest.mark.parametrize("seen_by", [FULL, CAUSAL, Mask(3, 0), Mask(2, 5), Mask(None, 4)])
def test_mirrored_twice_is_the_mask(seen_by):
    assert seen_by.mirrored.mirrored == seen_by


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-30, 1e30], ids=str)
def test_stand_in_has_the_same_delta_and_no_longer_rows(size, dtype):
    generator = torch.Generator().manual_seed(0)
    out, dout = (torch.randn(64, 2, 4, 32, generator=generator, dtype=torch.float64) for _ in range(2))
    out, dout = out.to(dtype), (dout * size).to(dtype)
    dout[3], dout[5, :, :, 1:] = 0, 0
    if not dout.isfinite().all():
        dout = dout.new_zeros(dout.shape)
    expected = delta(out, dout)
    substitute = stand_in(expected, dout)
    assert substitute.dtype == dtype
    assert not substitute[3].any()
    # a rounded row's delta is off by what rounding moves it, at most eps |dout| |out|
    allowed = 2 * torch.finfo(dtype).eps * (dout.double().norm(dim=-1) * out.double().norm(dim=-1))
    assert ((delta(substitute, dout).double() - expected.double()).abs() <= allowed + torch.finfo(dtype).tiny).all()
    longest = out.double().norm(dim=-1) * (1 + 2 * torch.finfo(dtype).eps)
    assert (substitute.double().norm(dim=-1) <= longest).all()
