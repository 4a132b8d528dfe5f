"""Schedules of any sizes and costs are complete, never deadlock and obey their bounds, or are refused in one line."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_cp.errors import Refused
from megatron_cp.pipeline import SCHEDULES
from megatron_cp.pipeline.action import FORWARD, halves
from megatron_cp.pipeline.bounds import bound_of
from megatron_cp.pipeline.build import build, place
from megatron_cp.pipeline.costs import uniform
from megatron_cp.pipeline.execute import forward_only, lower
from megatron_cp.pipeline.offload import Offload
from megatron_cp.pipeline.passes import check
from megatron_cp.pipeline.placement import PLACEMENTS
from megatron_cp.pipeline.simulate import simulate
from tests.fuzz.commands import assert_said_by_us
from tests.fuzz.conftest import Cases
from tests.fuzz.strategies import mostly
from tests.nccl import ALL_RULES, play
from tests.pipeline.launches import launches

pytestmark = pytest.mark.slow

SECONDS = st.floats(1e-3, 1e3)
HOSTILE_SECONDS = st.sampled_from([0.0, 1.0, 1e-9, 1e308, -1.0, math.nan, math.inf])


@given(
    name=st.sampled_from(SCHEDULES.names),
    p=st.integers(2, 6) | st.integers(0, 8),
    m=st.integers(1, 4).map(lambda n: 6 * n) | st.integers(0, 24),
    v=mostly(None, st.integers(0, 4)),
    warmup=mostly(None, st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0, -1.0, math.nan, math.inf])),
    placement=mostly(None, st.sampled_from([*PLACEMENTS, "x"])),
    overlapped=mostly(False, st.just(True)),
    times=st.integers(0, 9).flatmap(lambda draw: st.tuples(*[SECONDS if draw else HOSTILE_SECONDS] * 4)),
    memory=st.tuples(st.floats(0.1, 10), st.floats(0, 1)),
    cap=mostly(None, st.floats(0, 30)),
    moves=mostly(
        None, st.builds(Offload, mostly(2, st.integers(-1, 9) | st.none()), st.sampled_from(["host", "peer"]))
    ),
)
@example("1f1b", 2, 1, None, None, None, False, (1.0, 1.0, 1.0, 0.0), (1.0, 1.0), None, None)
@example("gpipe", 2, 6, None, None, None, False, (1.0, 1.0, 1e308, 0.0), (1.0, 0.0), None, None)
@example("gis", 4, 6, None, None, None, False, (1.0, 1.0, 1.0, 0.0), (1.0, 0.5), None, Offload(2))
def test_schedule_is_right_or_refused(
    counted: Cases,
    name: str,
    p: int,
    m: int,
    v: int | None,
    warmup: float | None,
    placement: str | None,
    overlapped: bool,
    times: tuple[float, ...],
    memory: tuple[float, ...],
    cap: float | None,
    moves: Offload | None,
) -> None:
    with counted.one():
        try:
            if name == "auto":
                costs = uniform(place(SCHEDULES.get(name), p, v, placement), times, memory)
                caps = None if cap is None else [cap] * p
                made = build(name, p, m, v, placement=placement, costs=costs, caps=caps, moves=moves)
            else:
                made = build(name, p, m, v, warmup=warmup, overlapped=overlapped, placement=placement, moves=moves)
                costs = uniform(made.placement, times, memory)
        except Refused as refusal:
            counted.refused += 1
            assert_said_by_us(refusal)
            return
        check(made)
        where = made.placement
        done = [half for row in made.table for cell in row for half in halves(cell) if half.kind == FORWARD]
        assert len(done) == len(set(done)) == where.length * m
        step = simulate(made, costs)
        assert math.isfinite(step.makespan)
        assert step.makespan >= bound_of(made, costs) * (1 - 1e-9)
        assert step.bubble >= -1e-9
        for table in (lower(made), forward_only(where, m)):
            operations = launches(table)
            for rules in ALL_RULES:
                play(operations, rules)
