"""Slices of a sequence in the pipeline: published figures, laws for every rule and size, and what is refused."""

from itertools import pairwise

import pytest

from megatron_cp.pipeline import SCHEDULES
from megatron_cp.pipeline.action import BACKWARD, FORWARD, WEIGHT, flat
from megatron_cp.pipeline.bounds import lower_bound
from megatron_cp.pipeline.build import build
from megatron_cp.pipeline.costs import uniform
from megatron_cp.pipeline.execute import forward_only, lower
from megatron_cp.pipeline.offload import Offload, most_kept
from megatron_cp.pipeline.simulate import SimulatedStep, simulate
from megatron_cp.pipeline.slices import (
    AttentionShares,
    SliceShare,
    cut,
    equal_shares,
    flash_shares,
    flash_times,
    fractions,
    shares,
)
from tests.cases import slow_unless
from tests.nccl import ALL_RULES, play
from tests.pipeline.launches import launches

SLICED = [rule.name for rule in SCHEDULES if rule.takes_slices]
SIZES = [2, 3, 4, 5, 8, 16]


def sliced(
    name: str,
    p: int,
    m: int,
    k: int,
    *,
    v: int | None = None,
    times: tuple[float, ...] = (1.0, 1.0, 1.0),
    parts: tuple[SliceShare, ...] | None = None,
    moves: Offload | None = None,
) -> SimulatedStep:
    schedule = build(name, p, m, v, slices=k, moves=moves)
    return simulate(schedule, uniform(schedule.placement, (*times, 0.0), slices=parts or equal_shares(k)))


@pytest.mark.parametrize("k", [1, 2, 4, 8])
@pytest.mark.parametrize(("p", "m"), [(4, 8), (4, 24), (8, 8), (8, 24)])
def test_slices_of_equal_cost_divide_idle_time_and_memory(p: int, m: int, k: int) -> None:
    run = sliced("1f1b", p, m, k)
    assert run.makespan - 3 * m == pytest.approx(3 * (p - 1) / k, abs=1e-9)
    assert run.peak == pytest.approx([(p - 1 - rank + k) / k for rank in range(p)])


# p, k, the attention's share -> idle of slices of equal length, m = 24, attention's backward at twice its forward
BY_LENGTH = {
    (8, 2, 0.5): 30.4,
    (8, 2, 1.0): 50.25,
    (8, 4, 0.5): 33.1,
    (8, 4, 1.0): 60.9,
    (8, 8, 0.5): 34.0,
    (8, 8, 1.0): 65.3,
    (4, 2, 0.5): 22.9,
    (4, 2, 1.0): 41.3,
    (4, 4, 0.5): 29.0,
    (4, 4, 1.0): 55.7,
}


@pytest.mark.parametrize(("p", "k", "attention"), BY_LENGTH)
def test_slices_of_equal_length_are_worse_than_none(p: int, k: int, attention: float) -> None:
    alike = AttentionShares(attention, attention, attention)
    idle = sliced("1f1b", p, 24, k, parts=shares([1.0] * k, alike)).makespan - 72
    assert idle == pytest.approx(BY_LENGTH[p, k, attention], abs=0.051)
    assert idle > 3 * (p - 1)


@pytest.mark.parametrize(
    ("attention", "lengths", "peaks", "flash_idle"),
    [
        (0.0, [0.25] * 4, (2.75, 1.0), 5.25),
        (0.5, [0.366, 0.252, 0.205, 0.177], (2.98, 1.24), 7.5),
        (0.9, [0.474, 0.217, 0.167, 0.141], (3.17, 1.38), 6.6),
    ],
)
def test_slices_of_equal_cost_under_attention(attention, lengths, peaks, flash_idle) -> None:
    alike = AttentionShares(attention, attention, attention)
    found = fractions(4, alike, (1.0, 1.0, 1.0), split=False)
    assert found == pytest.approx(lengths, abs=6e-4)
    run = sliced("1f1b", 8, 24, 4, parts=shares(found, alike))
    assert run.makespan - 72 == pytest.approx(5.25, abs=1e-6)
    assert (run.peak[0], run.peak[-1]) == pytest.approx(peaks, abs=6e-3)
    # the cut is by forwards, while the attention's backward takes 2.5 forwards
    backward = 2 + 0.5 * attention
    flash = AttentionShares(attention, 2.5 * attention / backward, 0.0)
    times = (1.0, backward, 1e-12)
    late = sliced("1f1b", 8, 24, 4, times=times, parts=shares(found, flash)).makespan - 24 * sum(times)
    assert late == pytest.approx(flash_idle, abs=0.051)


@pytest.mark.parametrize(
    ("name", "p", "m", "k", "v", "makespan", "peak"),
    [
        ("zb-h1", 4, 8, 4, 1, 24.75, 1.75),
        ("zb-h1", 8, 24, 4, 1, 73.75, 2.75),
        ("zb-h1", 8, 24, 8, 1, 72.875, 1.875),
        ("izb", 4, 8, 4, 2, 24.375, 1.375),
        ("izb", 8, 24, 8, 2, 72.4375, 1.4375),
        ("izb", 8, 4, 8, 2, 12.4375, 1.4375),
        ("interleaved", 4, 8, 4, 2, 25.125, 1.75),
        ("interleaved", 8, 24, 8, 2, 73.3125, 1.875),
        ("interleaved", 8, 4, 16, 2, 12.65625, 1.4375),
    ],
)
def test_split_and_interleaved_slices(name, p, m, k, v, makespan, peak) -> None:
    run = sliced(name, p, m, k, v=v)
    assert run.makespan == pytest.approx(makespan, abs=1e-9)
    assert max(run.peak) == peak
    if name != "interleaved":
        assert set(run.peak) == {peak}


# the attention's share, m -> bubbles of zb-h1 by length, then 1f1b and zb-h1 by cost with k = 4 and with k = 8; peaks
REAL = {
    (0.3, 24): (0.142, 0.082, 0.048, 0.051, 0.026, 2.95, 2.08),
    (0.5, 24): (0.268, 0.083, 0.059, 0.055, 0.035, 3.05, 2.18),
    (0.9, 24): (0.431, 0.073, 0.070, 0.043, 0.041, 3.18, 2.30),
    (0.5, 4): (0.430, 0.313, 0.269, 0.191, 0.165, 3.05, 2.18),
}


@pytest.mark.parametrize(("attention", "m"), REAL)
def test_slices_under_the_costs_of_fused_attention(attention: float, m: int) -> None:
    times = flash_times(attention)
    real = flash_shares(attention, times)

    def by_cost(name: str, k: int) -> SimulatedStep:
        lengths = fractions(k, real, times, SCHEDULES.get(name).split)
        return sliced(name, 8, m, k, times=times, parts=shares(lengths, real))

    equal = sliced("zb-h1", 8, m, 4, times=times, parts=shares([1.0] * 4, real))
    runs = [equal, *(by_cost(name, k) for k in (4, 8) for name in ("1f1b", "zb-h1"))]
    found = [run.bubble for run in runs] + [max(runs[2].peak), max(runs[4].peak)]
    assert found == pytest.approx(REAL[attention, m], abs=6e-3)
    assert found[:5] == pytest.approx(REAL[attention, m][:5], abs=1.1e-3)


FEW = [(2, 3, 4), (4, 2, 3), (5, 1, 7)]


@pytest.mark.parametrize(
    ("p", "m", "k"),
    slow_unless(FEW, sorted({(p, m, k) for p in SIZES for m in (1, 2, 5) for k in (2, 3, 4, 7)} | {*FEW})),
)
@pytest.mark.parametrize("name", SLICED)
def test_backwards_of_a_sequence_undo_its_forwards(name: str, p: int, m: int, k: int) -> None:
    schedule = build(name, p, m, slices=k)
    assert (schedule.micros, schedule.sequences) == (m * k, m)
    for cells in schedule.table:
        actions = list(flat(cells))
        for sequence in range(m):
            own = [action for action in actions if (action.micro or 0) // k == sequence]
            forwards = [action[::2] for action in own if action.kind == FORWARD]
            assert [action[::2] for action in own if action.kind in BACKWARD] == forwards[::-1]
            for stage in {stage for stage, _ in forwards}:
                assert [micro for here, micro in forwards if here == stage] == list(
                    range(sequence * k, sequence * k + k)
                )
    run = simulate(schedule, uniform(schedule.placement, (1.0, 1.0, 1.0, 0.1), slices=equal_shares(k)))
    assert run.makespan >= lower_bound(schedule.placement, m, run.costs) - 1e-9
    # any rank ends with nothing kept, and the last one starts with a whole sequence
    assert run.peak[-1] >= 1 - 1e-9
    assert max(run.peak) <= m + 1e-9


@pytest.mark.parametrize("name", SLICED)
def test_one_slice_is_the_rule_itself(name: str) -> None:
    assert build(name, 4, 8, slices=1) == build(name, 4, 8)


@pytest.mark.parametrize(
    ("p", "m", "k"), slow_unless([(4, 2, 4)], [(2, 2, 3), (4, 2, 4), (3, 1, 5), (4, 6, 2), (8, 3, 8)])
)
@pytest.mark.parametrize("name", SLICED)
def test_no_sliced_table_deadlocks_under_the_rules_of_nccl(name: str, p: int, m: int, k: int) -> None:
    schedule = build(name, p, m, slices=k)
    for table in (lower(schedule), forward_only(schedule.placement, schedule.micros)):
        operations = launches(table)
        for rules in ALL_RULES:
            play(operations, rules)


@pytest.mark.parametrize("name", ["1f1b", "zb-h1", "izb"])
def test_slices_move_away_under_a_limit(name: str) -> None:
    base, limited = sliced(name, 4, 3, 4), sliced(name, 4, 3, 4, moves=Offload(4))
    assert max(most_kept(limited.schedule)) == 4 < max(most_kept(base.schedule))
    assert sum(limited.peak) < sum(base.peak)
    weights = [action for cells in limited.schedule.table for action in flat(cells) if action.kind == WEIGHT]
    assert len(weights) == (0 if name == "1f1b" else 4 * 3 * 4 * limited.schedule.placement.chunks)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("reach", [1.0, 0.25])
def test_slices_cut_by_cost_cost_the_same_and_add_up(share: float, reach: float) -> None:
    times = flash_times(share)
    real = flash_shares(share, times, reach)
    parts = shares(fractions(5, real, times, split=True), real)
    costs = [part.forward * times[0] + part.input * times[1] for part in parts]
    assert costs == pytest.approx([sum(times[:2]) / 5] * 5, rel=1e-9)
    for whole in zip(*parts, strict=True):
        assert sum(whole) == pytest.approx(1)
    if reach == 1.0 and share:
        assert all(first.kept > second.kept for first, second in pairwise(parts))


@pytest.mark.parametrize("k", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_borders_are_multiples_and_no_slice_is_empty(k: int, share: float) -> None:
    lengths = cut(64, 4, fractions(k, AttentionShares(share, share), (1.0, 1.0), split=True))
    assert sum(lengths) == 64
    assert len(lengths) == k
    assert all(length > 0 and length % 4 == 0 for length in lengths)


def test_more_slices_than_multiples_are_refused() -> None:
    with pytest.raises(ValueError, match="17 slices of 64 tokens in multiples of 4 leave some empty; take at most 16"):
        cut(64, 4, [1 / 17] * 17)
    with pytest.raises(ValueError, match="multiple of 8 tokens, got 60"):
        cut(60, 8, [0.5, 0.5])


@pytest.mark.parametrize("name", [rule.name for rule in SCHEDULES if not rule.takes_slices])
def test_rules_without_an_order_for_slices_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} has no order for 2 slices of a sequence; take one of gpipe, 1f1b"):
        build(name, 4, 8, slices=2)


def test_no_slices_are_refused() -> None:
    with pytest.raises(ValueError, match="1 slice or more, got 0"):
        build("1f1b", 4, 8, slices=0)


def test_attention_beyond_the_backward_is_refused() -> None:
    with pytest.raises(ValueError, match=r"takes 1\.25 in the backward, more than T_I = 1"):
        flash_shares(0.5, (1.0, 1.0, 1.0))
