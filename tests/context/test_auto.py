"""Backend `auto`: chosen before anything is sent, equal on every rank, as exact as the chosen algorithm."""

import pytest

from megatron_cp.comm import in_process
from megatron_cp.context import AUTO, BACKENDS, auto
from megatron_cp.context.attend import Sizes, plan
from megatron_cp.context.auto import decide, settle
from megatron_cp.context.trace.events import Problem
from megatron_cp.context.trace.record import record
from megatron_cp.grid import Grid
from megatron_cp.hardware.cluster_file import load_cluster
from tests.cases import slow_unless
from tests.context.dense import problem
from tests.context.test_backends import assert_equals_dense, sharded

SIZES = Sizes(96, 8, 2, 16, "float64", "cpu")


def settled(fabric, grid=None, sizes=SIZES, **choices):
    axes = {axis: fabric.subset(grid.members(axis, fabric.rank)) for axis in ("inner", "outer")} if grid else {}
    return settle(plan(AUTO, cp=fabric, **axes, **choices), sizes)


MASKS = [(True, None), (False, None), (True, (9, 0)), (False, (3, 11))]


@pytest.mark.parametrize(
    ("grid", "causal", "window"),
    slow_unless(
        [(Grid(2, 2), True, None)],
        [(grid, *mask) for grid in (None, Grid(2, 2)) for mask in MASKS],
    ),
    ids=str,
)
def test_what_it_takes_equals_dense(grid, causal, window):
    task = problem(48, 8, 2, causal=causal)._replace(window=window)
    parts = in_process(4, lambda fabric: sharded(fabric, task, AUTO, grid))
    assert_equals_dense(parts, task)


def test_every_rank_chooses_the_same_and_sends_nothing():
    def body(fabric):
        made = settled(fabric, Grid(2, 2))
        return made.backend.name, made.why, made.sent

    found = in_process(4, body)
    assert set(found) == {found[0]}
    name, why, sent = found[0]
    assert name in BACKENDS.names
    assert name != AUTO
    assert why
    assert sent == 0


def test_the_plan_is_what_was_decided():
    cluster = load_cluster("h100-ib")
    sizes = Sizes(2**17, 32, 8, 128, "bfloat16", "cpu")
    choice = decide(Problem(AUTO, 4, 2**17, 32, 8, 128, causal=False, grid=Grid(2, 2)), cluster)
    for made in in_process(4, lambda fabric: settled(fabric, Grid(2, 2), sizes, causal=False, cluster=cluster)):
        assert (made.backend.name, made.why) == (choice.problem.backend, choice.why)
        assert (made.axes and made.axes.grid) == choice.problem.grid


def test_layers_of_one_shape_cost_one_decision(monkeypatch):
    calls = []
    original = auto.choose
    monkeypatch.setattr(auto, "choose", lambda *args: calls.append(1) or original(*args))
    sizes = SIZES._replace(seq=120)
    in_process(2, lambda fabric: [settled(fabric, sizes=sizes) for _ in range(20)])
    assert len(calls) == 1


def test_one_rank_has_nothing_to_choose():
    made = settle(plan(AUTO), SIZES)
    assert made.backend.name == "zigzag"
    assert settle(plan("ulysses"), SIZES).backend.name == "ulysses"


def test_an_unknown_cluster_is_refused_with_a_suggestion():
    with pytest.raises(ValueError, match="no cluster 'h100-ip'; did you mean 'h100-ib'"):
        plan(AUTO, cluster="h100-ip")


def test_lengths_that_do_not_fit_are_refused_before_anything_is_sent():
    def body(fabric):
        with pytest.raises(ValueError, match="got S = 98"):
            settled(fabric, sizes=SIZES._replace(seq=98))
        return fabric.sent

    assert in_process(4, body) == [0] * 4


def test_there_is_no_trace_of_auto_itself():
    with pytest.raises(ValueError, match="'auto' has no loop of its own"):
        record(Problem(AUTO, 2, 96))


@pytest.mark.slow
def test_chunks_around_what_it_takes_equal_dense():
    task = problem(48, 8, 2, causal=True, batch=1)
    assert_equals_dense(in_process(2, lambda fabric: sharded(fabric, task, AUTO, chunks=3)), task)


def test_stripes_are_weighed_at_their_own_length(monkeypatch):
    weighed, original = [], auto.choose
    monkeypatch.setattr(auto, "choose", lambda problem, *rest: weighed.append(problem) or original(problem, *rest))
    in_process(2, lambda fabric: settled(fabric, sizes=SIZES._replace(seq=144), layout="striped", stripe=4))
    assert [(problem.layout, problem.stripe) for problem in weighed] == [("striped", 4)]


def test_a_sequence_that_is_no_multiple_of_the_stripes_is_refused():
    def body(fabric):
        with pytest.raises(ValueError, match="got S = 96"):
            settled(fabric, layout="striped", stripe=20)

    in_process(4, body)
