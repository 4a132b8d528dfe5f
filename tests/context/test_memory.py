"""Memory of attention over real processes, by a tracker of live storages: a rank's share, whatever the sequence is."""

import pytest
import torch
import torch.distributed as dist

from megatron_cp.comm import GroupFabric
from megatron_cp.context.attend import attend
from megatron_cp.context.trace.events import Problem
from megatron_cp.context.trace.live import LiveBytes
from megatron_cp.context.trace.record import plan_on, record
from megatron_cp.grid import Grid
from tests.cases import slow_unless
from tests.ranks import run_ranks

TOKENS, HEADS, KV_HEADS, DIM = 256, 8, 8, 32
RINGS = ["ring", "zigzag", "striped", "bidirectional", "tokenring"]


def on(backend, ranks):
    grid = Grid(ranks // 2, 2) if backend == "double-ring" else None
    return Problem(backend, ranks, TOKENS * ranks, HEADS, KV_HEADS, DIM, dtype="float32", grid=grid)


def peaks(problems):
    """Most live bytes beside the local q, k, v and dout, forward and backward, with a real kernel."""
    dist.init_process_group("gloo")
    found = []
    for problem in problems:
        made = plan_on(problem, GroupFabric(dist.group.WORLD), "torch")
        q, k, v, dout = (torch.randn(TOKENS, 1, HEADS, DIM) for _ in range(4))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        with LiveBytes(*leaves, dout) as live:
            attend(*leaves, made).backward(dout)
        found.append(live.peak)
    dist.barrier()
    return found


@pytest.fixture(scope="module")
def measured():
    """The busiest rank's peak by backend and number of ranks."""
    return {
        (backend, ranks): max(column)
        for ranks in (2, 4, 8)
        for backend, column in zip(
            RINGS, zip(*run_ranks(ranks, peaks, [on(b, ranks) for b in RINGS]), strict=True), strict=True
        )
    }


@pytest.mark.parametrize("backend", slow_unless(["zigzag"], RINGS))
def test_memory_of_a_rank_is_constant_when_ranks_and_tokens_double_together(measured, backend):
    two, four, eight = (measured[backend, ranks] for ranks in (2, 4, 8))
    print(f"{backend:>14}", *(f"P={p} {n / 2**20:.2f} MiB" for p, n in ((2, two), (4, four), (8, eight))))
    assert abs(eight - four) <= 0.1 * four
    # a ring of two has one hop: fewer blocks and gradients are under way at a time
    assert two <= 1.1 * four


# a double ring has as much under way as it ever has from two windows of four ranks on
@pytest.mark.parametrize("backend", slow_unless(["zigzag"], [*RINGS, "double-ring"]))
def test_memory_of_a_rank_stays_so_on_more_ranks(backend):
    eight, many = (
        max(max(run.peak) for run in (trace.forward, trace.backward))
        for trace in (record(on(backend, ranks)) for ranks in (8, 16))
    )
    assert abs(many - eight) <= 0.1 * eight
