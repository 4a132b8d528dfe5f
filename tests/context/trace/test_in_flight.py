"""No loop uses memory that a message in flight needs, and none makes the host wait for its device."""

from contextlib import suppress
from itertools import product

import pytest
import torch
from torch import Tensor

from megatron_cp.context import ALGORITHMS, BACKENDS, returns
from megatron_cp.context.algorithms import ring
from megatron_cp.context.function import run
from megatron_cp.context.trace.events import Problem
from megatron_cp.context.trace.record import plan_on
from megatron_cp.errors import Refused
from tests.cases import slow_unless
from tests.context.problems import grids
from tests.context.slicing import run_slices
from tests.context.test_documents import TOKENS, case, grid_of
from tests.context.test_slices import SLICED
from tests.context.trace.in_flight import Watch, WatchedFabric, WatchedKernel


def watched(problem: Problem, rank: int) -> Watch:
    """Forward and backward of one rank."""
    tokens = problem.seq // problem.ranks
    q, k, v, dout = (
        torch.zeros(tokens, 1, heads, problem.head_dim, dtype=torch.bfloat16)
        for heads in (problem.heads, problem.kv_heads, problem.kv_heads, problem.heads)
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with Watch() as watch:
        plan = plan_on(
            problem,
            WatchedFabric(watch, tuple(range(problem.ranks)), rank, problem.ranks_per_node),
            WatchedKernel(watch),
        )
        run(*leaves, plan, packed=problem.packed).backward(dout)
    return watch


def watched_slices(problem: Problem, lengths: list[int], rank: int) -> Watch:
    """Forward and backward of one rank over the slices of a sequence."""
    with Watch() as watch:
        fabric = WatchedFabric(watch, tuple(range(problem.ranks)), rank)
        run_slices(problem, plan_on(problem, fabric, WatchedKernel(watch)), lengths, "meta")
    return watch


WHOLE, WINDOW, CHUNKS = ((True, None), None), ((True, (9, 0)), None), ((True, None), 2)


@pytest.mark.parametrize(("mask", "chunks"), slow_unless([WHOLE], [WHOLE, WINDOW, CHUNKS]))
@pytest.mark.parametrize("backend", ALGORITHMS)
def test_no_loop_uses_what_is_in_flight_or_waits_for_the_device(backend, mask, chunks):
    operations = 0
    for grid, rank in product(grids(backend, 4), range(4)):
        with suppress(Refused):
            watch = watched(Problem(backend, 4, 96, 12, 4, 2, *mask, grid=grid, chunks=chunks), rank)
            assert not watch.found
            assert not any(watch.in_flight.values()), "a batch was never waited for"
            operations += watch.operations
    refused = chunks and not BACKENDS.get(backend).capabilities.chunks
    assert operations or refused


@pytest.mark.parametrize("backend", slow_unless(["zigzag", "tokenring", "usp"], SLICED))
def test_no_slice_uses_what_is_in_flight_or_waits_for_the_device(backend):
    lengths = [24, 48, 24]
    for rank in range(2):
        watch = watched_slices(Problem(backend, 2, sum(lengths), 4, 2, 2, grid=grid_of(backend, 2)), lengths, rank)
        assert watch.operations
        assert not watch.found
        assert not any(watch.in_flight.values()), "a batch was never waited for"


@pytest.mark.parametrize(
    ("backend", "layout"),
    slow_unless(
        [(backend, "stream") for backend in ("zigzag", "all-gather", "usp", "striped", "tokenring")],
        product(ALGORITHMS, ["stream", "blocks", "document"]),
    ),
)
def test_no_loop_uses_what_is_in_flight_on_packed_documents(backend, layout):
    packed, refused = case("causal", 3).packed, 0
    for rank in range(3):
        how = {"grid": grid_of(backend, 3), "documents": packed, "document_layout": layout, "cut": True}
        try:
            watch = watched(Problem(backend, 3, TOKENS * 3, 12, 4, 2, **how), rank)
        except Refused:
            refused += 1
            continue
        assert watch.operations
        assert not watch.found
        assert not any(watch.in_flight.values()), "a batch was never waited for"
    assert refused in ((0,) if layout == "stream" else (0, 3))


@pytest.mark.parametrize("causal", [True, False])
def test_no_collective_is_used_while_it_is_in_flight(causal):
    for rank in range(4):
        watch = watched(Problem("all-gather", 4, 96, 12, 4, 2, causal, ranks_per_node=2), rank)
        assert not watch.found
        assert not any(watch.in_flight.values()), "a collective was never waited for"


def test_a_use_of_what_a_collective_fills_is_found():
    with Watch() as watch:
        fabric, local, gathered = WatchedFabric(watch, (0, 1), 0), torch.ones(4), torch.zeros(2, 4)
        handle = fabric.start_all_gather(gathered, local)
        gathered.sum()
        local.add_(1)
        handle.wait()
        gathered.sum()
    assert watch.found == ["sum reads a receive of batch 1 in flight", "add_ writes a send of batch 1 in flight"]


def test_a_write_to_what_is_sent_is_found(monkeypatch):
    original = ring.circulating

    def writing(block, way, fabric):
        for here in original(block, way, fabric):
            here.k.mul_(1)
            yield here
            del here

    monkeypatch.setattr(ring, "circulating", writing)
    found = watched(Problem("zigzag", 4, 96, 12, 4, 2), 0).found
    assert found[0] == "mul_ writes a send of batch 1 in flight"


def test_a_result_that_is_added_before_it_has_come_is_found(monkeypatch):
    def adding_first(self):
        for item in self._incoming:
            item.add(item.rows, *item.buffers)
        self._transfer.wait()
        self._incoming = ()

    monkeypatch.setattr(returns.Returns, "finish", adding_first)
    found = watched(Problem("zigzag", 4, 96, 12, 4, 2), 0).found
    assert "add_ reads a receive of batch" in found[0]


@pytest.mark.parametrize("use", [Tensor.item, Tensor.nonzero, bool], ids=["item", "nonzero", "bool"])
def test_an_operation_for_which_the_host_waits_is_found(use):
    with Watch() as watch:
        use(torch.ones(1))
    assert watch.found[0].endswith("waits for the device")


def test_other_bytes_of_a_storage_in_flight_may_be_used():
    whole = torch.empty(8, 2, device="meta")
    with Watch() as watch:
        handle = WatchedFabric(watch, (0, 1), 0).exchange([(whole[:2], 1)], [(whole[4:6], 1)])
        whole[2:4].add_(whole[:2]).add_(whole[6:])
        assert not watch.found
        whole[5:7].mul(2)
        whole[1:3].zero_()
        handle.wait()
        whole.zero_()
    assert watch.found == ["mul reads a receive of batch 1 in flight", "zero_ writes a send of batch 1 in flight"]
