"""Work cut into chunks over time: exact around every backend, the traffic of Ulysses, the memory of one chunk."""

import pytest
import torch

from megatron_cp.comm import in_process
from megatron_cp.context import ALGORITHMS, BACKENDS
from megatron_cp.context.algorithms.fpdt import CHUNK_TOKENS, FEWEST_CHUNKS, FPDT, chunked, cut
from megatron_cp.context.attend import attend, plan
from megatron_cp.context.layouts import LAYOUTS, layout
from megatron_cp.context.masks import CAUSAL, Mask
from megatron_cp.context.task import Task
from megatron_cp.context.trace.live import LiveBytes
from megatron_cp.grid import Grid
from megatron_cp.kernels.reference import ReferenceKernel
from tests.cases import slow_unless
from tests.context.dense import problem
from tests.context.test_backends import assert_equals_dense, sharded
from tests.ranks import run_ranks

MASKS = [(True, None), (False, None), (True, (9, 0)), (False, (3, 11))]


@pytest.mark.parametrize(("causal", "window"), slow_unless([(True, None), (False, (3, 11))], MASKS), ids=str)
@pytest.mark.parametrize("backend", [name for name in ALGORITHMS if BACKENDS.get(name).capabilities.chunks])
def test_chunks_around_every_backend_equal_dense(backend, causal, window):
    task = problem(48, 8, 2, causal=causal, batch=1)._replace(window=window)
    grid = Grid(2, 2) if BACKENDS.get(backend).needs_grid else None
    assert_equals_dense(in_process(4, lambda fabric: sharded(fabric, task, backend, grid, chunks=3)), task)


@pytest.mark.parametrize("chunks", [1, 2, 3, 6])
@pytest.mark.parametrize(("heads", "kv_heads"), [(7, 7), (10, 5), (8, 1)])
def test_any_number_of_chunks_and_heads_equals_dense(heads, kv_heads, chunks):
    task = problem(36, heads, kv_heads, causal=True, batch=1)
    assert_equals_dense(in_process(3, lambda fabric: sharded(fabric, task, "fpdt", chunks=chunks)), task)


def test_seven_ranks_equal_dense():
    task = problem(84, 8, 2, causal=True, batch=1)
    assert_equals_dense(in_process(7, lambda fabric: sharded(fabric, task, "fpdt", chunks=3)), task)


def sent(ranks, backend, causal=True, **choices):
    task = problem(12 * ranks, 8, 2, causal=causal, batch=1)

    def body(fabric):
        sharded(fabric, task, backend, **choices)
        return fabric.sent

    return in_process(ranks, body)


@pytest.mark.parametrize("chunks", [1, 2, 6])
@pytest.mark.parametrize("ranks", [2, 4, 5])
def test_sends_what_ulysses_sends(ranks, chunks):
    assert sent(ranks, "fpdt", chunks=chunks) == sent(ranks, "ulysses")


def test_chunks_of_a_ring_send_keys_once_per_chunk_of_queries():
    whole = sent(3, "zigzag", causal=False)
    assert sent(3, "zigzag", causal=False, chunks=3) == [3 * one for one in whole]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_chunks_hold_every_token_once_and_stand_at_equal_distances(name, ranks, count):
    owned = layout(name, 12 * ranks, ranks)
    found = cut(owned, count)
    assert sorted(i for chunk in found.tokens for tokens in chunk for i in range(12)[tokens]) == list(range(12))
    for chunk, positions in enumerate(found.layouts):
        here = [[position for run in runs for position in run] for runs in positions]
        moved = [[position + chunk * found.shift for run in runs for position in run] for runs in found.layouts[0]]
        assert here == moved


@pytest.mark.parametrize(
    ("tokens", "chunks"), [(48, 6), (1 << 18, FEWEST_CHUNKS), (1 << 20, 16), (3 << 20, (3 << 20) // CHUNK_TOKENS)]
)
def test_without_a_number_a_chunk_is_at_most_the_papers(tokens, chunks):
    assert len(cut(layout("zigzag", tokens, 4), None).tokens) == chunks


@pytest.mark.parametrize(("mask", "pairs"), [(CAUSAL, 10), (Mask(), 16), (Mask(5, 0), 7)])
def test_pairs_of_segments_that_see_nothing_are_left_out(mask, pairs):
    def body(fabric):
        task = Task(
            fabric=fabric,
            layout=layout("zigzag", 48, 2),
            mask=mask,
            scale=1.0,
            kernel=ReferenceKernel(),
            heads=(2, 2),
            chunks=4,
        )
        made = chunked(task, FPDT().inside)
        return sum(1 for i in range(4) for _ in made.seen(i))

    assert in_process(2, body) == [pairs, pairs]


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        (0, "chunks is the number of pieces, 1 or more, got 0"),
        (5, r"divide the 6 tokens of each of a rank's 2 pieces, got chunks = 5; take a divisor or pad S = 24 to 40"),
    ],
)
def test_a_number_of_chunks_that_does_not_fit_is_refused_before_anything_is_sent(chunks, message):
    def body(fabric):
        x = torch.zeros(12, 1, 2, 8, dtype=torch.float64)
        with pytest.raises(ValueError, match=message):
            attend(x, x, x, plan("fpdt", cp=fabric, chunks=chunks))
        return fabric.sent

    assert in_process(2, body) == [0, 0]


def test_a_backend_that_wants_whole_sequences_is_refused_chunks():
    with pytest.raises(ValueError, match="backend 'distflash' cannot be cut into chunks; leave chunks out or use"):
        plan("distflash", chunks=2)


COUNTS = [2, 8, 16]


def peaks(dtype):
    """Live bytes beside q, k, v and dout, forward and backward, over the bytes of q: of Ulysses and of every count."""
    import torch.distributed as dist

    from megatron_cp.comm import GroupFabric

    dist.init_process_group("gloo")
    fabric = GroupFabric(dist.group.WORLD)
    q, k, v, dout = (torch.randn(2048, 1, 8, 32, dtype=dtype) for _ in range(4))
    found = []
    for chunks in [None, *COUNTS]:
        made = plan("ulysses", cp=fabric, kernel="torch", chunks=chunks)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        with LiveBytes(*leaves, dout) as live:
            attend(*leaves, made).backward(dout)
        found.append(live.peak / (q.numel() * q.element_size()))
    dist.barrier()
    return found


@pytest.mark.parametrize("dtype", slow_unless([torch.float32], [torch.float32, torch.bfloat16]), ids=str)
def test_memory_of_attention_is_that_of_two_chunks_of_ulysses(dtype):
    # dq, dk and dv; the caller gets them from either
    results = 3
    for whole, *cut_up in run_ranks(2, peaks, dtype):
        for count, peak in zip(COUNTS, cut_up, strict=True):
            assert peak - results <= (2 / count + 0.1) * (whole - results), count
