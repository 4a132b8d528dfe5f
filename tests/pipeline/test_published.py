"""The figures of the papers, and closed forms, out of the simulator."""

from dataclasses import replace

import pytest

from megatron_cp.pipeline.costs import uniform
from megatron_cp.pipeline.placement import loop
from megatron_cp.pipeline.simulate import simulate
from tests.pipeline.played import PROFILES, RATIOS, chunk_units, played, scheduled

SPAN_BUBBLES = {
    "1f1b": (0.2431, 0.1985, 0.1240, 0.2347, 0.1898, 0.1091),
    "zb-h1": (0.1585, 0.1242, 0.0674, 0.1323, 0.1045, 0.0554),
    "zb-h2": (0.1083, 0.0837, 0.0444, 0.0698, 0.0559, 0.0294),
}
BUBBLES = {
    "1f1b": (0.2431, 0.1985, 0.1240, 0.2347, 0.1898, 0.1091),
    "zb-h1": (0.1585, 0.1242, 0.0674, 0.1323, 0.1045, 0.0554),
    "interleaved:2": (0.1396, None, None, 0.1336, None, 0.0547),
    "zb-h2": (0.1083, None, None, 0.1003, None, 0.0405),
    "zb-v": (0.0728, 0.0563, 0.0307, 0.0601, 0.0466, 0.0236),
    "izb:2": (0.0960, 0.0743, 0.0402, 0.0761, 0.0596, 0.0307),
    "izb:4": (0.0668, 0.0518, 0.0289, 0.0482, 0.0380, 0.0190),
    "izb:4:2": (0.0601, 0.0464, 0.0254, 0.0446, 0.0350, 0.0176),
    "v-half": (0.1702, None, None, 0.1447, None, 0.0607),
    "v-min": (0.3353, None, None, 0.2721, None, 0.2013),
    "dualpipe-v": (0.0924, None, None, 0.0742, None, 0.0299),
    "1f1b-v": (None, None, None, 0.2496, None, None),
}
INTERLEAVED = {("1.5B", 3): (0.1055, 0.0818, 0.0443), ("6.2B", 4): (0.0808, 0.0628, 0.0320)}
RATIO_BUBBLES = {
    "1f1b": (0.226, 0.226, 0.226, 0.226, 0.226),
    "zb-h1": (0.089, 0.127, 0.135, 0.172, 0.185),
    "interleaved:2": (0.127, 0.127, 0.127, 0.127, 0.127),
    "interleaved:4": (0.068, 0.068, 0.068, 0.068, 0.068),
    "zb-v": (0.046, 0.053, 0.059, 0.111, 0.115),
    "izb:2": (0.046, 0.068, 0.072, 0.094, 0.102),
    "izb:3": (0.031, 0.046, 0.049, 0.065, 0.070),
    "izb:4": (0.024, 0.035, 0.037, 0.050, 0.054),
    "v-half": (0.106, 0.136, None, 0.294, 0.278),
    "v-min": (0.158, 0.255, None, 0.478, 0.469),
    "dualpipe-v": (0.046, 0.068, None, None, 0.122),
}
RANKS = range(2, 17)


@pytest.mark.parametrize("name", SPAN_BUBBLES)
def test_span_bubble_of_the_zero_bubble_paper_to_four_digits(name):
    for ((_, p, m), times), published in zip(PROFILES.items(), SPAN_BUBBLES[name], strict=True):
        assert round(played(name, p, m, times).span_bubble, 4) == published


@pytest.mark.parametrize("name", BUBBLES)
def test_makespan_bubble_to_four_digits(name):
    for ((_, p, m), times), expected in zip(PROFILES.items(), BUBBLES[name], strict=True):
        assert expected is None or round(played(name, p, m, times).bubble, 4) == expected


@pytest.mark.parametrize("model", INTERLEAVED)
def test_interleaved_is_near_the_published_column(model):
    rows = [(p, m, times) for (name, p, m), times in PROFILES.items() if name == model[0]]
    for (p, m, times), published in zip(rows, INTERLEAVED[model], strict=True):
        assert played(f"interleaved:{model[1]}", p, m, times).span_bubble == pytest.approx(published, abs=0.004)


@pytest.mark.parametrize("name", RATIO_BUBBLES)
def test_makespan_bubble_by_ratio_of_times(name):
    for times, expected in zip(RATIOS.values(), RATIO_BUBBLES[name], strict=True):
        assert expected is None or abs(played(name, 8, 24, times).bubble - expected) <= 0.0005 + 1e-9


@pytest.mark.parametrize("p", RANKS)
@pytest.mark.parametrize("rounds", [2, 3])
def test_idle_and_peak_of_one_chunk_rules(p, rounds):
    m = rounds * p
    assert chunk_units("1f1b", p, m) == (3 * (p - 1), p)
    assert chunk_units("gpipe", p, m) == (3 * (p - 1), m)
    assert chunk_units("dapple-b", p, m) == (3 * (p - 1), 2 * p - 1)
    assert chunk_units("zb-h1", p, m) == (p - 1, p)
    assert chunk_units("zb-h2", p, m) == (p - 1, 2 * p - 1)
    assert played("zb-h2", p, m).span == 3 * m


@pytest.mark.parametrize("p", RANKS)
def test_peak_of_every_rank_with_split_memory(p):
    m, kept, held = 2 * p, 3.0, 2.0
    assert played("1f1b", p, m).peak == tuple(p - r for r in range(p))
    assert played("dapple-b", p, m).peak == tuple(2 * (p - r) - 1 for r in range(p))
    h1 = played("zb-h1", p, m, memory=(kept, held)).peak
    assert h1 == pytest.approx([(p - r) + r * held / kept for r in range(p)])
    h2 = played("zb-h2", p, m, memory=(kept, held)).peak
    assert h2 == pytest.approx([2 * (p - r) - 1 + 2 * r * held / kept for r in range(p)])


@pytest.mark.parametrize("v", [2, 3, 4])
@pytest.mark.parametrize("p", RANKS)
def test_idle_and_peak_of_chunked_rules(p, v):
    m = 2 * p
    assert chunk_units(f"interleaved:{v}", p, m) == (3 * (p - 1), 2 * (p - 1) + (v - 1) * p + 1)
    assert chunk_units(f"breadth-first:{v}", p, m) == (3 * (p - 1), m * v)
    assert chunk_units(f"gis:{v}", p, m) == (2 * (p - 1), v * p)
    assert chunk_units(f"izb:{v}", p, m) == (p - 1, v * p)
    flat = played(f"izb:{v}", p, m).peak
    assert flat == (p,) * p


@pytest.mark.parametrize("v", [2, 3])
@pytest.mark.parametrize("p", [4, 6, 8])
def test_half_groups_hold_fewer_chunks_and_wait_longer(p, v):
    idle, peak = chunk_units(f"gis-h:{v}", p, 3 * p)
    group = p // 2
    assert peak == group * (v - 1) + p
    assert idle == 2 * (p - 1) + (p - group) * (v - 1)


@pytest.mark.parametrize("m_of", [lambda p: p, lambda p: 2 * p, lambda p: 2 * p + 3])
@pytest.mark.parametrize("p", range(3, 17))
def test_idle_and_peak_of_building_block_rules(p, m_of):
    m = m_of(p)
    assert chunk_units("v-half", p, m) == (3 * p - (4 if p % 2 else 7), 2 * ((p + 2) // 2))
    assert chunk_units("v-min", p, m) == (4 * p - (5 if p % 3 else 7), 2 * ((p + 4) // 3))


@pytest.mark.parametrize("p", RANKS)
def test_idle_and_peak_of_zero_bubble_v_rules(p):
    m = 2 * p
    assert chunk_units("zb-v", p, m) == (p - 1, 2 * p)
    assert played("zb-v", p, m).span == 3 * m
    assert chunk_units("dualpipe-v", p, m) == (p - 1, 2 * p + 1)


@pytest.mark.parametrize(("p", "idle", "peak"), [(4, 15, 6), (6, 22, 10), (8, 33, 12), (16, 75, 22), (32, 153, 44)])
def test_idle_and_peak_of_1f1b_on_the_v(p, idle, peak):
    assert chunk_units("1f1b-v", p, 2 * p) == (idle, peak)


@pytest.mark.parametrize(
    ("name", "p", "makespans"),
    [
        ("zb-v", 2, {2: 14, 4: 25}),
        ("zb-v", 4, {4: 30, 7: 45, 8: 51, 16: 99}),
        ("zb-v", 8, {8: 62, 15: 97, 16: 103, 32: 199}),
        ("1f1b", 4, {4: 21, 8: 33, 12: 45}),
        ("zb-h1", 4, {4: 15, 8: 27, 12: 39}),
        ("zb-h2", 4, {4: 16}),
        ("1f1b", 8, {8: 45, 16: 69, 24: 93, 32: 117}),
        ("zb-h1", 8, {8: 31}),
        ("zb-h2", 8, {8: 34}),
        ("interleaved:2", 8, {16: 117, 24: 165, 32: 213}),
        ("interleaved:4", 8, {16: 213, 24: 309, 32: 405}),
        ("v-half", 4, {6: 41, 8: 53}),
        ("v-min", 4, {6: 47, 8: 59}),
        ("1f1b-v", 8, {16: 129, 24: 177}),
    ],
)
def test_unit_makespans(name, p, makespans):
    found = {m: played(name, p, m) for m in makespans}
    assert {m: round(run.makespan * run.schedule.placement.chunks) for m, run in found.items()} == makespans


@pytest.mark.parametrize("times", RATIOS.values(), ids=RATIOS)
@pytest.mark.parametrize("p", [4, 8])
def test_idle_with_unequal_times(p, times):
    forward, back, weight, _ = times
    m = 3 * p
    ideal = m * (forward + back + weight)
    assert played("1f1b", p, m, times).makespan == pytest.approx(ideal + (p - 1) * (forward + back + weight))
    assert played("zb-h1", p, m, times).makespan == pytest.approx(ideal + (p - 1) * (forward + back - weight))
    for v in (2, 3):
        izb = played(f"izb:{v}", p, m, times).makespan
        assert izb == pytest.approx(ideal + (p - 1) * (forward + back - min(weight, back)) / v)


@pytest.mark.parametrize(
    ("name", "expected"), [("1f1b", 0.4317), ("zb-h1", 0.3666), ("interleaved:2", 0.3842), ("zb-v", 0.3418)]
)
def test_a_heavy_head_swamps_the_choice_of_schedule(name, expected):
    """32 layers of cost 1 and a head of 2.4 on the last stage, p = 8, m = 24."""
    schedule = scheduled(name, 8, 24)
    even = uniform(schedule.placement, (4.0, 4.0, 4.0, 0.0))
    last = (*even.forward[:-1], even.forward[-1] + 2.4)
    run = simulate(schedule, replace(even, forward=last, input=last, weight=last))
    assert round(run.bubble, 4) == expected


@pytest.mark.parametrize(
    ("tied", "makespan"), [(0.0, 15.0), (4.0, 15.0), (9.0, 16.0)], ids=["untied", "behind the middle rank", "longer"]
)
def test_ends_of_a_tied_embedding_are_added_up_once_both_have_run(tied, makespan):
    # by hand: F 0-1 1-2 2-3, I 3-4 4-5 5-6, W of the last rank 4-5, of the middle one 5-15, of the first 6-7
    costs = replace(uniform(loop(3, 1), (1.0, 1.0, 1.0, 0.0)), weight=(1.0, 10.0, 1.0), tied=tied)
    run = simulate(scheduled("zb-h1", 3, 1), costs)
    assert [ends[-1] for ends in run.ends] == [7.0, 15.0, 5.0]
    assert run.makespan == makespan
