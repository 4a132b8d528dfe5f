"""The automatic scheduler: never worse than a rule, under its caps, above the bound, and quick."""

from dataclasses import replace
from time import process_time

import pytest

from megatron_cp.pipeline import SCHEDULES
from megatron_cp.pipeline.bounds import lower_bound
from megatron_cp.pipeline.build import build
from megatron_cp.pipeline.costs import uniform
from megatron_cp.pipeline.passes import check
from megatron_cp.pipeline.placement import Placement, loop, vee
from megatron_cp.pipeline.schedule import BadSchedule
from megatron_cp.pipeline.schedules.auto import auto
from megatron_cp.pipeline.simulate import simulate
from tests.cases import slow_unless
from tests.pipeline.played import FIXED, PROFILES, RATIOS, played

ROWS = {f"{model} m{m}": (m, times) for (model, _, m), times in PROFILES.items() if m == 24} | {
    ratio: (24, times) for ratio, times in RATIOS.items()
}


def fixed_runs(placement, m, costs, caps):
    """Every fixed rule of the same placement and chunks that fits under the caps, played."""
    runs = {}
    for rule in SCHEDULES:
        if rule.delay:
            continue
        v = rule.chunks or placement.chunks
        for warmup in (1.0, 1.5, 2.0) if rule.takes_warmup else (None,):
            try:
                schedule = build(
                    rule.name, placement.ranks, m, v, warmup=warmup, costs=costs if rule.table else None, caps=caps
                )
            except ValueError:
                continue
            if schedule.placement == placement:
                runs[rule.name, warmup] = simulate(schedule, costs)
    return runs


def fitted(placement, m, costs, caps=None):
    schedule = check(auto(placement, m, costs, caps))
    run = simulate(schedule, costs)
    if caps:
        assert all(peak <= cap + 1e-9 for peak, cap in zip(run.peak, caps, strict=True))
    assert run.makespan >= lower_bound(placement, m, costs, caps) * (1 - 1e-12)
    best = min((fixed.makespan for fixed in fixed_runs(placement, m, costs, caps).values()), default=run.makespan)
    assert run.makespan <= best
    return run


@pytest.mark.parametrize(
    ("row", "v"),
    slow_unless([("1:1:1", 1), ("1.5B m24", 2), ("6.2B m24", 4)], [(row, v) for row in ROWS for v in (1, 2, 4)]),
)
def test_with_half_as_much_memory_again_it_beats_izb(row, v):
    m, times = ROWS[row]
    run = fitted(loop(8, v), m, uniform(loop(8, v), times), [12.0] * 8)
    for warmup in (1, 2):
        izb = played(f"izb:{v}:{warmup}", 8, m, times)
        if max(izb.peak) <= 12:
            assert run.makespan <= izb.makespan
            assert row == "1:1:1" or run.bubble < izb.bubble - 1e-6


@pytest.mark.parametrize("row", slow_unless(["6.2B m24"], ["6.2B m24", "3:5:1"]))
def test_with_the_memory_of_1f1b_it_is_no_worse_than_any_rule(row):
    m, times = ROWS[row]
    for placement in (loop(8, 4), vee(8, 2)):
        fitted(placement, m, uniform(placement, times), [8.0] * 8)


@pytest.mark.parametrize("row", slow_unless(["1:2:.5"], ["6.2B m24", "1:2:.5", "3:5:1"]))
def test_on_the_v_it_beats_zb_v(row):
    m, times = ROWS[row]
    costs = uniform(vee(8), times)
    for cap in (8.0, 12.0):
        assert fitted(vee(8), m, costs, [cap] * 8).bubble < played("zb-v", 8, m, times).bubble - 1e-6


def test_four_chunks_of_the_6_2b_profile():
    placement, times = loop(8, 4), PROFILES["6.2B", 8, 24]
    costs = uniform(placement, times)
    assert fitted(placement, 24, costs, [12.0] * 8).bubble < 0.036
    tight = fitted(placement, 24, costs, [8.0] * 8)
    assert round(1 - tight.work / lower_bound(placement, 24, costs, [8.0] * 8), 4) == 0.0363


@pytest.mark.slow
def test_a_large_step_is_scheduled_in_less_than_ten_seconds():
    placement = loop(32, 4)
    costs = uniform(placement, PROFILES["6.2B", 8, 64])
    start = process_time()
    schedule = auto(placement, 256, costs, [48.0] * 32)
    assert process_time() - start < 10
    assert simulate(schedule, costs).makespan <= played("izb:4", 32, 256, PROFILES["6.2B", 8, 64]).makespan


@pytest.mark.parametrize("cap", [1, 1.5, 2, 4, None])
@pytest.mark.parametrize(
    "placement",
    [loop(4, 1), loop(4, 3), vee(4, 2), vee(3, 4), Placement("custom", (0, 1, 2, 1, 0, 2))],
    ids=lambda placement: f"{placement.name}-{placement.chunks}",
)
def test_every_placement_and_cap_down_to_one_microbatch(placement, cap):
    costs = uniform(placement, (3.0, 5.0, 1.0, 0.2), (4.0, 3.0))
    fitted(placement, 6, costs, [cap] * placement.ranks if cap else None)


def test_a_cap_below_one_microbatch_is_refused_with_the_minimum():
    placement = loop(4, 2)
    with pytest.raises(ValueError, match="below the minimum 1 M_B"):
        auto(placement, 8, uniform(placement, (1.0, 1.0, 1.0, 0.0)), [1.0, 1.0, 1.0, 0.75])


def test_uneven_stages_and_caps_of_their_own():
    placement = loop(4, 2)
    even = uniform(placement, (2.0, 2.5, 1.5, 0.1))
    costs = replace(even, forward=(*even.forward[:-1], 2.6), kept=(1.5, *even.kept[1:]), held=(1.2, *even.held[1:]))
    caps = [4.0, 3.0, 5.0, 2.0]
    run = fitted(placement, 12, costs, caps)
    loose = fitted(placement, 12, costs)
    assert loose.makespan <= run.makespan


def test_span_objective_shortens_the_longest_span():
    placement, times = loop(4, 1), (1.0, 1.0, 1.0, 0.0)
    costs = uniform(placement, times)
    run = simulate(auto(placement, 12, costs, objective="span"), costs)
    assert run.span <= played("zb-h2", 4, 12, times).span == 36


def test_the_same_question_has_the_same_answer():
    placement = vee(4, 2)
    costs = uniform(placement, PROFILES["1.5B", 8, 24])
    assert auto(placement, 9, costs, [4.0] * 4) == auto(placement, 9, costs, [4.0] * 4)


@pytest.mark.parametrize("times", RATIOS.values(), ids=RATIOS)
@pytest.mark.parametrize("name", FIXED)
def test_no_rule_beats_the_bound_under_its_own_peak(name, times):
    for p, m in ((2, 3), (3, 6), (4, 8), (8, 8)):
        try:
            run = played(name, p, m, (*times[:3], 0.3))
        except BadSchedule:
            continue
        assert run.makespan >= lower_bound(run.schedule.placement, m, run.costs, run.peak) * (1 - 1e-12)
