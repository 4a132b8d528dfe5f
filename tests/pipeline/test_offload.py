"""Moves of activations under a limit: published figures, laws for every schedule and size, and what is refused."""

from contextlib import suppress
from itertools import pairwise

import pytest

from megatron_cp.pipeline import SCHEDULES
from megatron_cp.pipeline.action import BACKWARD, MOVES, Action, flat
from megatron_cp.pipeline.build import build, price_of_moves
from megatron_cp.pipeline.costs import Costs, uniform
from megatron_cp.pipeline.execute import lower
from megatron_cp.pipeline.offload import Offload, balanced, described, most_kept, offload, smallest_limit
from megatron_cp.pipeline.passes import check, without_moves
from megatron_cp.pipeline.placement import loop
from megatron_cp.pipeline.profile import lower_split
from megatron_cp.pipeline.schedule import BadSchedule, Schedule, parse
from megatron_cp.pipeline.schedules.auto import unmoved
from megatron_cp.pipeline.simulate import SimulatedStep, simulate
from tests.cases import slow_unless
from tests.nccl import ALL_RULES, Rules, play
from tests.pipeline.launches import launches
from tests.pipeline.played import FIXED, UNIT, scheduled

SIZES = [2, 3, 4, 5, 8, 16]


def run_with(schedule: Schedule, move: float, held: float = 1.0) -> SimulatedStep:
    return simulate(schedule, uniform(schedule.placement, UNIT, (1.0, held), move=move))


def test_lists_of_bpipe() -> None:
    moved = offload(scheduled("1f1b", 4, 6), Offload(3, "peer"))
    lowered = lower(moved)
    lists = [
        [str(action)[1:] for action in flat(cells) if not action.kind.startswith(("SEND", "RECV", "REDUCE"))]
        for cells in lowered.table
    ]
    assert lists[0] == "F0 F1 F2 EVICT2 F3 EVICT3 B0 F4 B1 LOAD2 F5 B2 LOAD3 B3 B4 B5".split()
    assert lists[3] == "HOLD2 HOLD3 F0 B0 F1 B1 F2 B2 GIVE2 F3 B3 GIVE3 F4 B4 F5 B5".split()
    assert parse(lowered.text(), "1f1b") == lowered


# p, m -> the most chunks of a rank, chunks moved, makespans for moves of 0, 1, 1.5, 2 and 3 times T_F
BPIPE = {
    (4, 8): ([3, 3, 3, 3], 7, [33, 33, 34, 36, 40]),
    (4, 24): ([3, 3, 3, 3], 25, [81, 81, 87, 93, 107]),
    (8, 8): ([5, 5, 5, 5, 5, 5, 5, 4], 9, [45, 45, 45.5, 47, 50]),
    (8, 24): ([5] * 8, 35, [93, 93, 98, 105, 119]),
    (16, 48): ([9] * 16, 124, [189, 189, 202.5, 218, 249]),
}


@pytest.mark.parametrize(("p", "m"), BPIPE)
def test_bpipe_evens_memory_out_and_is_free_while_a_move_takes_no_longer_than_a_forward(p: int, m: int) -> None:
    base = scheduled("1f1b", p, m)
    moved = offload(base, Offload(balanced(p), "peer"))
    peaks, count, makespans = BPIPE[p, m]
    runs = [run_with(moved, move) for move in (0.0, 1.0, 1.5, 2.0, 3.0)]
    assert [run.makespan for run in runs] == makespans
    assert list(runs[1].peak) == peaks
    assert runs[1].moved == count
    assert list(run_with(base, 1.0).peak) == [min(p - rank, m) for rank in range(p)]
    assert max(runs[-1].peak) <= balanced(p) + 1


# schedule, v, p, m, limit in chunks -> makespan and peak without; makespans for moves of .5 and 1 T_F, peak, moved
HOST = [
    ("1f1b", 1, 4, 8, 2, (33, 4), (33, 33), 2, 18),
    ("1f1b", 1, 8, 24, 2, (93, 8), (93, 93), 2, 154),
    ("1f1b", 1, 8, 24, 4, (93, 8), (93, 93), 4, 58),
    ("gis", 2, 8, 24, 8, (79, 8), (79.25, 79.5), 4, 132),
    ("gis", 2, 8, 24, 4, (79, 8), (80.25, 81.5), 2.5, 236),
    ("gis", 2, 8, 24, 2, (79, 8), (80.75, 82.5), 1.5, 346),
    ("gis", 4, 8, 24, 4, (75.5, 8), (78.125, 80.75), 1.25, 620),
    ("izb", 2, 8, 24, 8, (75.5, 8), (75.75, 76), 7.5, 132),
    ("zb-v", 2, 8, 24, 8, (75.5, 8), (79.75, 84), 7.5, 150),
]


@pytest.mark.parametrize(("name", "v", "p", "m", "limit", "without", "makespans", "peak", "count"), HOST)
def test_host_memory_for_activations(name, v, p, m, limit, without, makespans, peak, count) -> None:
    base = build(name, p, m, v)
    plain = run_with(base, 0.0)
    assert (plain.makespan, max(plain.peak)) == without
    runs = [run_with(offload(base, Offload(limit)), move) for move in (0.5, 1.0)]
    assert [run.makespan for run in runs] == pytest.approx(makespans)
    assert [max(run.peak) for run in runs] == [peak, peak]
    assert runs[0].moved == count


def assert_laws(schedule: Schedule, limit: int, to: str) -> Schedule:
    moved = check(offload(schedule, Offload(limit, to)))
    assert without_moves(moved).table == schedule.table
    assert max(most_kept(moved)) <= limit
    for cells in moved.table:
        order = [action for action in flat(cells) if action.kind in BACKWARD or action.kind == "LOAD"]
        for action, following in pairwise(order):
            if action.kind == "LOAD":
                assert following[0] == action.stage
                assert following[2] == action.micro
    # a chunk counts from its F to its backward here: what waits for W is not moved
    for move in (0.0, 0.5, 1.0, 3.0):
        run = run_with(moved, move, held=0.0)
        own = [peak * moved.placement.chunks for peak in run.peak]
        if to == "host" or not move:
            assert max(own) <= limit
        assert run.makespan >= run_with(schedule, 0.0).makespan - 1e-9
    if not any(action.kind in MOVES for cells in moved.table for action in flat(cells)):
        assert max(most_kept(schedule)) <= limit
    return moved


def assert_runs_under_nccl(moved: Schedule) -> None:
    for lowered in (lower(moved), lower_split(moved)):
        kinds = [action.kind for cells in lowered.table for action in flat(cells)]
        mates = kinds.count("HOLD"), kinds.count("GIVE")
        assert mates == ((kinds.count("EVICT"),) * 2 if moved.to == "peer" else (0, 0))
        operations = launches(lowered)
        for rules in ALL_RULES:
            play(operations, rules)


@pytest.mark.parametrize("name", slow_unless(["1f1b", "gis", "zb-v"], FIXED))
def test_no_rank_exceeds_its_limit_at_any_time(name: str) -> None:
    schedule = scheduled(name, 4, 10)
    for to in ("host", "peer"):
        least = smallest_limit(schedule, to)
        for limit in {least, (least + max(most_kept(schedule))) // 2}:
            moved = assert_laws(schedule, limit, to)
        assert_runs_under_nccl(moved)


@pytest.mark.slow
@pytest.mark.parametrize("p", range(2, 17))
@pytest.mark.parametrize("name", FIXED)
def test_no_rank_exceeds_its_limit_at_any_size(name: str, p: int) -> None:
    schedule = scheduled(name, p, 2 * p)
    for to in ("host", "peer"):
        moved = assert_laws(schedule, smallest_limit(schedule, to), to)
        if p in (2, 3, 5) or (to == "peer" and name == "1f1b" and p <= 8):
            assert_runs_under_nccl(moved)


@pytest.mark.parametrize("p", range(2, 17))
def test_smallest_limits_of_1f1b(p: int) -> None:
    schedule = scheduled("1f1b", p, 2 * p)
    assert smallest_limit(schedule) == 2
    assert smallest_limit(schedule, "peer") == balanced(p)
    bpipe = offload(schedule, Offload(balanced(p), "peer"))
    assert (bpipe.table == schedule.table) == (p < 4)


def test_rank_in_the_middle_keeps_its_own() -> None:
    plan = Offload(4, "peer")
    moved = offload(scheduled("1f1b", 5, 8), plan)
    assert not any(action.kind in MOVES for action in flat(moved.table[2]))
    assert described(moved) == (
        "4 of 40 chunks to the peer and back, at most 4 stay on a rank; "
        "rank 2 in the middle has no peer and keeps its own"
    )


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "gis", "dapple-b"])
def test_moves_on_the_streams_of_a_gpu_cost_what_the_simulator_says(name: str) -> None:
    schedule = scheduled(name, 4, 12)
    moved = offload(schedule, Offload(smallest_limit(schedule, "peer"), "peer"))
    assert any(action.kind in MOVES for action in flat(moved.table[0]))
    costs = uniform(schedule.placement, (1.0, 1.2, 0.8, 0.1), move=0.1 * schedule.placement.chunks)
    for eager in (False, True):
        seconds = play(launches(lower(moved), costs, first=False), Rules(eager, one_queue=False), costs.comm)
        assert seconds == pytest.approx(simulate(moved, costs).makespan, rel=1e-12)


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        ("0F0 0EVICT0 0F1 0B0 0B1", "0B0: runs before the LOAD of its activations"),
        ("0F0 0F1 0LOAD1 0B0 0B1", "0LOAD1: was not moved away"),
        ("0F0 0F1 0B0 0EVICT0 0B1", "0EVICT0: has no activations to move"),
        ("0F0 0EVICT0 0EVICT0 0F1 0B0 0B1", "0EVICT0: has no activations to move"),
        ("0EVICT0 0F0 0F1 0B0 0B1", "0EVICT0: has no activations to move"),
    ],
)
def test_misplaced_moves_are_named(table: str, fault: str) -> None:
    other = "\n1F0 1B0 1F1 1B1"
    assert check(parse("0F0 0F1 0EVICT1 0B0 0LOAD1 0B1" + other))
    with pytest.raises(BadSchedule, match=fault):
        check(parse(table + other))


@pytest.mark.parametrize(
    ("name", "plan", "message"),
    [
        ("1f1b", Offload(1), "1f1b cannot keep to 1 chunk per rank .* its smallest limit is 2"),
        ("1f1b", Offload(2, "peer"), "1f1b cannot keep to 2 chunks .* on the peer; its smallest limit is 3"),
        ("zb-v", Offload(2, "peer"), "zb-v cannot keep to 2 chunks .* its smallest limit is 8"),
        ("1f1b", Offload(2, "ghost"), "activations move to host or peer, got 'ghost'"),
    ],
)
def test_limits_that_cannot_be_kept_are_refused(name: str, plan: Offload, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, 4, 8, moves=plan)


def test_cap_holds_for_what_is_left() -> None:
    placement = scheduled("1f1b", 8, 24).placement
    costs = uniform(placement, UNIT, move=1.0)
    assert build("1f1b", 8, 24, costs=costs, caps=[2.0] * 8, moves=Offload(2))
    with pytest.raises(ValueError, match="a cap of 2 M_B is below the minimum 3 M_B of 1f1b"):
        build("1f1b", 8, 24, costs=costs, caps=[2.0] * 8, moves=Offload(3))


def moved_under_each_limit(table: Schedule, costs: Costs) -> list[SimulatedStep]:
    """Steps of a table without moves and under every limit, the largest first."""
    limits = range(max(most_kept(table)) - 1, smallest_limit(table) - 1, -1)
    return [simulate(each, costs) for each in (table, *(offload(table, Offload(limit)) for limit in limits))]


@pytest.mark.parametrize("move", [0.25, 1.0, 3.0])
@pytest.mark.parametrize(("p", "m", "v", "cap"), [(2, 4, 1, 1.5), (3, 7, 1, 2.0), (4, 8, 2, 1.75), (4, 8, 1, 3.5)])
def test_auto_weighs_all_tables_under_all_limits(p: int, m: int, v: int, cap: float, move: float) -> None:
    where = loop(p, v)
    costs, caps = uniform(where, (1.0, 1.0, 1.0, 0.1), (1.0, 0.5), move=move), [cap] * p
    rules = [rule for rule in SCHEDULES if rule.table and not (rule.lends or rule.delay or rule.two_copies)]
    tables = []
    for rule in rules:
        with suppress(ValueError):
            tables.append(build(rule.name, p, m, v))
    tables = [table for table in tables if table.placement == where]
    every = [moved_under_each_limit(table, costs) for table in tables]
    fit = [run for runs in every for run in runs if max(run.peak) <= cap]
    chosen = simulate(build("auto", p, m, v, costs=costs, caps=caps, moves=Offload(None)), costs)
    plain = simulate(build("auto", p, m, v, costs=costs, caps=caps), costs)
    assert max(chosen.peak) <= cap
    assert chosen.makespan <= min([plain.makespan, *(run.makespan for run in fit)])
    # why the largest limit that fits is enough
    for runs in every:
        assert [run.makespan for run in runs] == sorted(run.makespan for run in runs)
        assert [run.moved for run in runs] == sorted(run.moved for run in runs)
    # a rule of its own takes the limit that moves least
    for table, runs in zip(tables, every, strict=True):
        least = next((run for run in runs if max(run.peak) <= cap), None)
        if least:
            fixed = build(table.name, p, m, v, costs=costs, caps=caps, moves=Offload(None))
            assert simulate(fixed, costs).moved == least.moved
    known = unmoved.cache_info().misses
    said = price_of_moves(chosen, caps, "ms")
    assert unmoved.cache_info().misses == known, "the table without moves has been found on the way"
    assert said == (
        f"moving M_B takes {move:.3g} T_F, makespan {chosen.makespan:.5g} ms at {max(chosen.peak):.3g} M_B with moves, "
        f"{plain.makespan:.5g} ms at {max(plain.peak):.3g} M_B without"
    )


def test_slow_moves_are_left_out() -> None:
    where, caps = loop(4, 1), [2.0] * 4
    runs = []
    for move in (0.5, 50.0):
        costs = uniform(where, UNIT, move=move)
        runs.append(simulate(build("auto", 4, 8, costs=costs, caps=caps, moves=Offload(None)), costs))
    assert [run.moved > 0 for run in runs] == [True, False]


def test_action_of_a_move_reads_back() -> None:
    assert parse("0F0 0F1 0EVICT1 0B0 0LOAD1 0B1").table[0][2] == Action(0, "EVICT", 1)
