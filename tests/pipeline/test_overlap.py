"""A forward and a backward as one action: text, checks, times, memory, passes and execution, on DualPipe's tables."""

import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from megatron_cp.pipeline.action import Action, Overlap, flat, parse_cell
from megatron_cp.pipeline.bounds import lower_bound
from megatron_cp.pipeline.build import build
from megatron_cp.pipeline.costs import uniform
from megatron_cp.pipeline.execute import lower
from megatron_cp.pipeline.passes import check, merge
from megatron_cp.pipeline.profile import lower_split
from megatron_cp.pipeline.schedule import BadSchedule, Schedule, parse
from megatron_cp.pipeline.simulate import simulate
from megatron_cp.plots.timeline import draw_timeline
from tests.nccl import ALL_RULES, Rules, play
from tests.pipeline.executed import Layers, OverlappingLayers, execute, sequential
from tests.pipeline.launches import launches

SIZES = pytest.mark.parametrize(("p", "m"), [(2, 4), (2, 7), (3, 7), (4, 8), (4, 11)])
TIMES = (1.0, 1.2, 0.8, 0.1)

# DualPipeV's own order, in which F0 and B1 are of chunk 0 and 1
PUBLISHED = """
0F0 0F1 0F2 3F0 3I0 3W0 3F1 0F3+3B1 3F2+0B0 0F4+3B2 3F3+0B1 3B3 3F4+0B2 3B4 0I3 0W3 0I4 0W4
1F0 2F0 1F1 2F1 1F2 2B0 2F2+1B0 1F3+2B1 2F3+1B1 1F4+2B2 2F4+1B2 2B3 1B3 2I4 1I4 2W4 1W4
"""


BOTH = pytest.mark.parametrize(
    ("name", "p", "m"), [("dualpipe-v", 2, 7), ("dualpipe-v", 4, 8), ("dualpipe", 2, 4), ("dualpipe", 4, 10)]
)


def overlapped(p: int, m: int, name: str = "dualpipe-v") -> Schedule:
    return build(name, p, m, overlapped=True)


def apart(schedule: Schedule) -> Schedule:
    """The table with the halves of every overlap one after the other."""
    return replace(schedule, table=tuple(tuple(flat(cells)) for cells in schedule.table))


def test_an_overlap_reads_back() -> None:
    cell = Overlap(Action(2, "F", 3), Action(0, "B", 1))
    assert str(cell) == "2F3+0B1"
    assert parse_cell("2F3+0B1") == cell


@pytest.mark.parametrize("text", ["2F3+2B1", "0B1+2F3", "2F3+0W1", "2F3+", "+0B1", "2F3+0B1+1B0", "2F3 +0B1"])
def test_what_is_not_an_overlap_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not an (overlap|action); write"):
        parse_cell(text)


def test_the_published_order() -> None:
    assert overlapped(2, 5).table == parse(PUBLISHED).table


@SIZES
def test_only_the_overlaps_are_new(p: int, m: int) -> None:
    schedule = overlapped(p, m)
    assert apart(schedule) == build("dualpipe-v", p, m)
    assert parse(schedule.text(), schedule.name) == schedule
    assert any(isinstance(cell, Overlap) for cells in schedule.table for cell in cells)


def test_a_rule_without_overlaps_names_those_that_have_them() -> None:
    with pytest.raises(ValueError, match="zb-v overlaps no forward with a backward; take dualpipe-v"):
        build("zb-v", 2, 4, overlapped=True)


@pytest.mark.parametrize(
    ("right", "wrong", "reason"),
    [
        ("3F2+0B0", "3F2+0B1", "runs before its F|runs twice"),
        ("0F3+3B1", "0F2+3B1", "0F2: runs twice"),
        ("3F2+0B0", "3F2", "never runs 0I0"),
    ],
)
def test_a_fault_in_one_half_is_named(right: str, wrong: str, reason: str) -> None:
    with pytest.raises(BadSchedule, match=reason):
        check(parse(PUBLISHED.replace(right, wrong)))


def test_a_deadlock_names_what_both_halves_wait_for() -> None:
    crossed = "0F0 3F0 3F1+0B0 0F1 3B0 3B1 0B1\n1F0 2F0 2B0 1B0 1F1 2F1 2B1 1B1"
    with pytest.raises(BadSchedule, match=r"rank 0 at 3F1\+0B0 for 2F1 and 1I0; rank 1 at 2B0 for 3I0"):
        check(parse(crossed))


@SIZES
def test_without_hiding_a_pair_takes_the_sum(p: int, m: int) -> None:
    schedule = overlapped(p, m)
    run = simulate(schedule, uniform(schedule.placement, TIMES))
    plain = simulate(apart(schedule), run.costs)
    for cells, starts, ends in zip(schedule.table, run.starts, run.ends, strict=True):
        took = [end - start for cell, start, end in zip(cells, starts, ends, strict=True) if isinstance(cell, Overlap)]
        assert took == pytest.approx([1.5] * len(took))
    assert run.makespan >= plain.makespan - 1e-9
    assert run.work == pytest.approx(plain.work)
    assert run.peak == plain.peak


@SIZES
def test_hiding_shortens_the_step_down_to_the_bound(p: int, m: int) -> None:
    schedule = overlapped(p, m)
    costs = [uniform(schedule.placement, TIMES, hidden=hidden) for hidden in (0.0, 0.5, 1.0)]
    makespans = [simulate(schedule, cost).makespan for cost in costs]
    assert makespans[0] > makespans[1] > makespans[2]
    for cost, makespan in zip(costs, makespans, strict=True):
        assert makespan >= lower_bound(schedule.placement, m, cost)
    # the shorter half of a pair is the forward of a chunk, half of 1.0
    pairs = max(sum(isinstance(cell, Overlap) for cell in cells) for cells in schedule.table)
    assert makespans[0] - makespans[2] >= 0.5 * pairs - 1e-9


@pytest.mark.parametrize("hidden", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("times", [(1.0, 1.0, 1.0, 0.0), (1.0, 1.3, 0.7, 0.0)])
@pytest.mark.parametrize("p", [4, 8, 16])
def test_a_rank_of_dualpipe_idles_no_longer_than_published(p: int, times: tuple[float, ...], hidden: float) -> None:
    schedule = overlapped(p, 2 * p + 4, "dualpipe")
    run = simulate(schedule, uniform(schedule.placement, times, hidden=hidden))
    forward, backward, weight = times[0], times[1] + times[2], times[2]
    both = forward + backward - hidden * min(forward, backward)
    # DeepSeek-V3 (arXiv:2412.19437), table 2
    published = (p / 2 - 1) * (both + backward - 3 * weight)
    assert run.makespan - run.work <= published + 1e-9
    if not hidden and len(set(times[:3])) == 1:
        assert run.makespan - run.work == pytest.approx(published)


def test_how_much_is_hidden_is_a_share() -> None:
    with pytest.raises(ValueError, match=r"between 0 and 1 of its shorter half, got 1\.5"):
        uniform(overlapped(2, 4).placement, TIMES, hidden=1.5)


@SIZES
def test_lowering_keeps_the_pairs(p: int, m: int) -> None:
    schedule = overlapped(p, m)
    lowered = lower(schedule)
    pairs = [[cell for cell in cells if isinstance(cell, Overlap)] for cells in schedule.table]
    assert [[cell for cell in cells if isinstance(cell, Overlap)] for cells in lowered.table] == pairs
    assert not any(isinstance(cell, Overlap) for cells in lower_split(schedule).table for cell in cells)
    for cells in lowered.table:
        last = {action.stage: place for place, action in enumerate(flat(cells)) if action.kind in ("B", "W")}
        reduced = {action.stage: place for place, action in enumerate(flat(cells)) if action.kind == "REDUCE"}
        assert reduced.keys() == last.keys()
        assert all(reduced[stage] > last[stage] for stage in last)


PAIRS = [
    *((("dualpipe-v", p, m)) for p, m in [(2, 4), (2, 7), (3, 7), (4, 8), (4, 11)]),
    *((("dualpipe", p, m)) for p, m in [(2, 2), (2, 6), (4, 8), (6, 14), (8, 16)]),
]


@pytest.mark.parametrize(("name", "p", "m"), PAIRS)
def test_pairs_keep_nccls_rules_and_cost_no_more_than_the_transfers(name: str, p: int, m: int) -> None:
    schedule = merge(overlapped(p, m, name))
    costs = uniform(schedule.placement, TIMES, hidden=0.5)
    operations = launches(lower(schedule), costs)
    for rules in ALL_RULES:
        play(operations, rules)
    seconds = play(operations, Rules(eager=False, one_queue=False), costs.comm)
    assert seconds == pytest.approx(simulate(schedule, costs).makespan, rel=1e-12)


@pytest.mark.parametrize("kind", [Layers, OverlappingLayers])
@BOTH
def test_pairs_compute_what_one_rank_computes(name: str, p: int, m: int, kind: type[Layers]) -> None:
    schedule = lower(overlapped(p, m, name))
    losses, gradients = sequential(schedule.placement, m)
    ranks = execute(schedule, kind=kind)
    assert {micro: loss for layers in ranks for micro, loss in layers.losses.items()} == losses
    found = {stage: gradient for layers in ranks for stage, gradient in layers.gradients.items()}
    for stage, gradient in gradients.items():
        if schedule.placement.pipes == 1:
            assert torch.equal(found[stage], gradient)
        else:
            both = found[stage] + found[stage + len(gradients)]
            torch.testing.assert_close(both, gradient, rtol=1e-12, atol=1e-12)
    ran = [[action for action in flat(cells) if action.kind in "FBIW"] for cells in schedule.table]
    assert [layers.ran for layers in ranks] == ran
    if kind is OverlappingLayers:
        pairs = [[tuple(cell) for cell in cells if isinstance(cell, Overlap)] for cells in schedule.table]
        assert [layers.overlaps for layers in ranks] == pairs


def test_an_error_in_a_pair_names_both_halves() -> None:
    class Failing(OverlappingLayers):
        def overlap(self, forward, backward):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no") as failed:
        execute(lower(overlapped(2, 4)), kind=Failing)
    note = r"failed at (\d)F(\d)\+(\d)B(\d): stage \1, microbatch \2 and stage \3, microbatch \4$"
    assert re.search(note, failed.value.__notes__[0])


@pytest.mark.parametrize("suffix", [".json", ".svg"])
def test_both_halves_are_drawn(tmp_path, suffix: str) -> None:
    schedule = overlapped(2, 5)
    run = simulate(schedule, uniform(schedule.placement, TIMES, hidden=1.0))
    bars = run.bars()
    assert [[bar.action for bar in line] for line in bars] == [list(flat(cells)) for cells in schedule.table]
    for line in bars:
        assert all(one.end <= two.start + 1e-9 for one, two in pairwise(line))
    assert draw_timeline(bars, tmp_path / f"step{suffix}", "overlapped").stat().st_size > 0
