"""Laws of tables and passes: text both ways, faults found and shown, lowering that cannot deadlock."""

from collections import Counter, defaultdict, deque
from dataclasses import replace
from itertools import pairwise

import pytest

from megatron_cp.pipeline.action import COMPUTE, Action, parse_action
from megatron_cp.pipeline.costs import uniform
from megatron_cp.pipeline.passes import add_reductions, add_transfers, check, merge
from megatron_cp.pipeline.schedule import BadSchedule, parse
from megatron_cp.pipeline.simulate import simulate
from tests.pipeline.played import FIXED, UNIT, played, scheduled

GOOD = "0F0 0F1 0I0 0W0 0I1 0W1\n1F0 1I0 1F1 1I1 1W0 1W1"


@pytest.mark.parametrize("text", ["2F0", "12B345", "0SEND_F7", "3RECV_B0", "1REDUCE"])
def test_action_reads_back(text):
    assert str(parse_action(text)) == text


@pytest.mark.parametrize("text", ["F0", "2X0", "2F", "2REDUCE1", "2 F0", "-1F0", ""])
def test_what_is_no_action_is_refused(text):
    with pytest.raises(ValueError, match="is not an action"):
        parse_action(text)


@pytest.mark.parametrize("name", FIXED)
def test_schedule_reads_back(name):
    schedule = scheduled(name, 4, 8)
    assert parse(schedule.text(), schedule.name) == schedule


def test_lowered_schedule_reads_back():
    schedule = add_transfers(add_reductions(merge(scheduled("zb-v", 3, 5))))
    assert parse(schedule.text(), schedule.name) == schedule


def test_stage_on_two_ranks_is_no_placement():
    with pytest.raises(ValueError, match="exactly one rank"):
        parse("0F0 0B0\n0F1 0B1")


def test_table_without_an_action_is_refused():
    with pytest.raises(ValueError, match="table has no action; write"):
        parse("\n")


@pytest.mark.parametrize(
    ("broken", "reason", "cell"),
    [
        (("0F1 ", ""), "rank 0, 0I1: runs before its F", ">0I1<"),
        (("0W1", ""), "rank 0 never runs 0W1", ">0I1<"),
        (("0I1 0W1", ""), "rank 0 never runs 0I1", ">0W0<"),
        (("0F1", "0F0"), "rank 0, 0F0: runs twice", ">0F0<"),
        (("1W0 1W1", "1W1 1W0"), "is not the oldest I waiting for its W", ">1W1<"),
        (("1F1 1I1", "1F1 1B1"), "overtakes the W of microbatch 0", ">1B1<"),
        (("1I0 1F1", "1W0 1F1"), "is not the oldest I waiting for its W", ">1W0<"),
        (("0I0 0W0", "0F2 0I0 0W0"), "rank 0 never runs 0I2", ">0W1<"),
    ],
)
def test_fault_is_named_and_its_cell_marked(broken, reason, cell):
    assert check(parse(GOOD))
    with pytest.raises(BadSchedule) as caught:
        check(parse(GOOD.replace(*broken)))
    assert reason in str(caught.value).splitlines()[0]
    assert str(caught.value).count(">") == 1
    assert cell in str(caught.value)


def test_deadlock_names_the_waiting_action_of_every_rank():
    crossed = parse("0F0 0B0 0F1 0B1\n1F1 1B1 1F0 1B0")
    with pytest.raises(BadSchedule, match="deadlock: rank 0 at 0B0 for 1I0; rank 1 at 1F1 for 0F1") as caught:
        check(crossed)
    assert ">0B0<" in str(caught.value)
    assert ">1F1<" in str(caught.value)
    with pytest.raises(BadSchedule, match="deadlock: rank 0 at 0B0 for 1I0; rank 1 at 1F1 for 0F1"):
        simulate(crossed, uniform(crossed.placement, UNIT))


@pytest.mark.parametrize(
    ("name", "p", "m"), [("interleaved:3", 4, 5), ("izb:3:2", 4, 5), ("gis-h:3", 6, 4), ("dualpipe-v", 4, 6)]
)
def test_sizes_without_a_table_name_the_nearest_that_has_one(name, p, m):
    with pytest.raises(BadSchedule, match=r"the nearest m that works is (\d+)") as caught:
        scheduled(name, p, m)
    works = int(str(caught.value).split("the nearest m that works is ")[1].split(";")[0])
    assert scheduled(name, p, works)
    for nearer in range(m - abs(works - m) + 1, m + abs(works - m)):
        with pytest.raises(ValueError, match=r"has no valid table|at least one microbatch"):
            scheduled(name, p, nearer)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 7, 12])
@pytest.mark.parametrize("name", ["gpipe", "1f1b", "dapple-b", "zb-h1", "zb-h2", "izb:2", "gis:3", "zb-v", "v-half"])
def test_rule_works_for_every_number_of_microbatches(name, m):
    assert scheduled(name, 4, m).micros == m


@pytest.mark.parametrize("name", FIXED)
def test_merge_joins_neighbours_only_and_keeps_the_work(name):
    schedule = scheduled(name, 4, 8)
    merged, rank_of = check(merge(schedule)), schedule.placement.rank_of
    for rank, (before, after) in enumerate(zip(schedule.table, merged.table, strict=True)):
        split = [
            part
            for action in after
            for part in ((action._replace(kind="I"), action._replace(kind="W")) if action.kind == "B" else (action,))
        ]
        whole = [action for action in before if action.kind == "B"]
        assert whole or tuple(split) == before
        neighbours = [left for left, right in pairwise(before) if left.kind == "I" and right == left._replace(kind="W")]
        joined = [action for action in neighbours if not action.stage or rank_of[action.stage - 1] == rank]
        assert Counter(action.kind for action in after)["B"] == len(joined) + len(whole)


@pytest.mark.parametrize("times", [UNIT, (3.0, 4.0, 2.0, 0.5)])
@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("name", FIXED)
def test_merge_delays_nobody(name, p, times):
    schedule = scheduled(name, p, 2 * p)
    costs = uniform(schedule.placement, times)
    assert simulate(merge(schedule), costs).makespan == pytest.approx(simulate(schedule, costs).makespan, rel=1e-12)


@pytest.mark.parametrize("name", FIXED)
def test_every_stage_is_reduced_once_right_after_its_last_gradient(name):
    for actions in add_reductions(scheduled(name, 3, 6)).table:
        places = {action.stage: place for place, action in enumerate(actions) if action.kind == "REDUCE"}
        last = {action.stage: place for place, action in enumerate(actions) if action.kind in "BW"}
        assert places == {stage: place + 1 for stage, place in last.items()}
        assert sum(action.kind == "REDUCE" for action in actions) == len(last)


@pytest.mark.parametrize("p", [2, 3, 4])
@pytest.mark.parametrize("name", FIXED)
def test_lowered_table_runs_with_blocking_transfers(name, p):
    """Rendezvous semantics: a send returns only when its receive is reached, per channel in the order posted."""
    schedule = scheduled(name, p, 2 * p)
    lowered = add_transfers(add_reductions(merge(schedule)))
    assert (
        tuple(tuple(action for action in actions if action.kind in COMPUTE) for actions in lowered.table)
        == merge(schedule).table
    )
    assert blocking(lowered) == sum(map(len, lowered.table))


def blocking(lowered):
    """How many actions run before every rank stands still."""
    queues = [deque(actions) for actions in lowered.table]
    there = [set() for _ in queues]
    rank_of = lowered.placement.rank_of
    done = 0
    moved = True
    while moved:
        moved = False
        for rank, queue in enumerate(queues):
            while queue and (ran := step(queues, there, rank_of, rank)):
                done += ran
                moved = True
    return done


def step(queues, there, rank_of, rank):
    action = queues[rank][0]
    stage, kind, micro = action
    if kind.startswith("SEND"):
        target = stage + 1 if kind == "SEND_F" else stage - 1
        mate = Action(target, kind.replace("SEND", "RECV"), micro)
        other = queues[rank_of[target]]
        if not other or other[0] != mate:
            return 0
        queues[rank].popleft()
        other.popleft()
        there[rank_of[target]].add((target, kind[-1], micro))
        return 2
    if kind.startswith("RECV"):
        return 0
    if kind == "F" and stage and rank_of[stage - 1] != rank and (stage, "F", micro) not in there[rank]:
        return 0
    last = len(rank_of) - 1
    if kind in "BI" and stage < last and rank_of[stage + 1] != rank and (stage, "B", micro) not in there[rank]:
        return 0
    queues[rank].popleft()
    return 1


def test_turn_of_the_v_is_handed_over_without_a_transfer():
    lowered = add_transfers(scheduled("zb-v", 4, 8))
    sent = defaultdict(set)
    for actions in lowered.table:
        for action in actions:
            if action.kind.startswith(("SEND", "RECV")):
                sent[action.kind].add(action.stage)
    assert sent["SEND_F"] == {0, 1, 2, 4, 5, 6}
    assert sent["RECV_B"] == {0, 1, 2, 4, 5, 6}
    assert played("zb-v", 4, 8).transfers == sum(
        action.kind.startswith("SEND") for actions in lowered.table for action in actions
    )


def test_deadlock_is_found_while_transfers_are_added():
    schedule = scheduled("1f1b", 2, 2)
    backwards_first = tuple(tuple(reversed(actions)) for actions in schedule.table)
    with pytest.raises(BadSchedule, match="deadlock"):
        add_transfers(replace(schedule, table=backwards_first))
