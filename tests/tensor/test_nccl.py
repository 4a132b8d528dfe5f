"""The linears of tensor parallelism run under NCCL's rules, and use no memory that a message in flight needs."""

from itertools import product

import pytest
import torch
from torch import Tensor

from megatron_cp.context.trace.events import Pass, match
from megatron_cp.context.trace.record import Recorder, RecordingFabric
from megatron_cp.grid import divisors
from megatron_cp.planner.linear_trace import record_linears
from megatron_cp.tensor import ENGINES
from megatron_cp.tensor.cost import LayerLinears, Placing
from megatron_cp.tensor.cube_3d import cube_engines, features_over, tokens_over
from megatron_cp.tensor.place import GridSize
from megatron_cp.tensor.ring import RingEngine
from tests.cases import slow_unless
from tests.context.trace.in_flight import Watch, WatchedFabric
from tests.context.trace.launches import launches
from tests.nccl import DeadlockError, MismatchError, Rules, Tally, play

RUNNING = ["collective", "ring"]
"""Engines whose messages are those of a fabric."""

GRIDS = [GridSize(p // weights, weights) for p in range(2, 9) for weights in divisors(p)]


def layer_of(ranks: int) -> LayerLinears:
    return LayerLinears(2 * ranks, 4 * ranks, 6 * ranks, 4 * ranks, 8 * ranks, 4 * ranks)


@pytest.mark.parametrize(
    ("grid", "engine"),
    slow_unless([(GridSize(3, 1), "ring"), *product([GridSize(2, 2)], RUNNING)], product(GRIDS, RUNNING)),
)
def test_no_linear_on_a_grid_deadlocks(grid: GridSize, engine: str, tally: Tally) -> None:
    trace = record_linears(layer_of(grid.grid.ranks), Placing("2d", grid, engine), "bfloat16")
    tally.play(launches(trace.forward, trace.backward))


def on_cube(engine: str) -> Pass:
    """Both linears of an MLP on 2 x 2 x 2 ranks, forward and backward, and the exchanges around them."""
    side, ranks = 2, []

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    for rank in range(side**3):
        with Recorder() as recorder:
            engines = cube_engines(RecordingFabric(recorder, tuple(range(side**3)), rank), engine)
            first, second = (engines.linear(first=first, blocks=1) for first in (True, False))
            # hidden and inner size 16: a rank has 16 / 4 outputs and 16 / 2 inputs of a weight
            x, weight = features_over(empty(4, 16), engines.k.fabric), empty(4, 8)
            y = first.forward(x, weight)
            z = second.forward(y, weight)
            tokens_over(z, engines.k.fabric)
            dy, _ = second.backward(z, y, weight)
            first.input_gradient(dy, weight)
            first.weight_gradient(dy, x)
            ranks.append(recorder.take())
    return Pass(tuple(ranks), 0)


@pytest.mark.parametrize("engine", slow_unless(["ring"], RUNNING))
def test_no_linear_on_a_cube_deadlocks(engine: str, tally: Tally) -> None:
    run = on_cube(engine)
    match(run)
    tally.play(launches(run))


def test_ranks_that_pass_their_pieces_the_other_way_round_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = record_linears(layer_of(3), Placing("flux", GridSize(3, 1), "ring"), "bfloat16")
    ranks = launches(trace.forward, trace.backward)
    batches = [place for place, operation in enumerate(ranks[1]) if operation.messages]
    # rank 1 leaves one batch out: its neighbours wait for a message that never comes, or take a later one for it
    del ranks[1][batches[0] :]
    with pytest.raises((DeadlockError, MismatchError)):
        play(ranks, Rules(eager=True, one_queue=False))


def uses(engine: str, ranks: int, rank: int) -> Watch:
    """All products of an engine over one axis, on memory that is watched."""
    with Watch() as watch:
        made = ENGINES.get(engine).load()(WatchedFabric(watch, tuple(range(ranks)), rank))
        made.ag_matmul(torch.zeros(4, 6), torch.zeros(6, 8))
        made.matmul_rs(torch.zeros(4 * ranks, 6), torch.zeros(6, 8))
        made.reduce_scatter(torch.zeros(ranks, 4, 6))
        made.wgrad(torch.zeros(4 * ranks, 8), torch.zeros(4, 6))
        made.wgrad(torch.zeros(4, 8), torch.zeros(4 * ranks, 6))
        made.ag_matmul_and_wgrad(torch.zeros(4, 6), torch.zeros(6, 8), torch.zeros(4 * ranks, 8))
    return watch


@pytest.mark.parametrize(("engine", "ranks"), list(product(RUNNING, (2, 3, 4))))
def test_no_product_uses_what_is_in_flight_or_waits_for_the_device(engine: str, ranks: int) -> None:
    for rank in range(ranks):
        watch = uses(engine, ranks, rank)
        assert watch.operations
        assert not watch.found
        assert not any(watch.in_flight.values()), "a batch was never waited for"


def test_a_piece_that_is_used_before_it_has_come_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = RingEngine.arrivals

    def adding(self: RingEngine, local: Tensor) -> object:
        for arrival in original(self, local):
            arrival.tensor.add_(1)
            yield arrival

    monkeypatch.setattr(RingEngine, "arrivals", adding)
    assert uses("ring", 3, 0).found[0] == "add_ writes a send of batch 1 in flight"
