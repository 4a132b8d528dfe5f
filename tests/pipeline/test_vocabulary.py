"""The LM head over all ranks of a pipeline: published figures, laws for every size, and what is refused."""

from dataclasses import replace
from math import floor

import pytest

from megatron_cp.pipeline import SCHEDULES
from megatron_cp.pipeline.action import HEAD, REDUCE, SHARE, SUM_S, SUM_T, SUMS, Action, flat
from megatron_cp.pipeline.bounds import bound_of
from megatron_cp.pipeline.build import build, place
from megatron_cp.pipeline.costs import Costs, MeetingTimes, uniform
from megatron_cp.pipeline.execute import lower
from megatron_cp.pipeline.offload import Offload
from megatron_cp.pipeline.passes import check
from megatron_cp.pipeline.schedule import BadSchedule, Schedule, parse
from megatron_cp.pipeline.simulate import SimulatedStep, simulate
from megatron_cp.pipeline.vocabulary import returned_before, with_head
from tests.cases import slow_unless
from tests.nccl import ALL_RULES, MismatchError, play
from tests.pipeline.launches import launches

TAKERS = [rule.name for rule in SCHEDULES if rule.takes_vocabulary]
SIZES = [(2, 1), (2, 5), (3, 7), (4, 2), (4, 24), (5, 5), (8, 3), (8, 24), (12, 13)]
FEW = [(2, 1), (3, 7), (4, 24)]


def costs_of(p: int, head: float = 0.0, comm: float = 0.0) -> Costs:
    """Costs with T_B = 2 T_F whose logits take a third of the head on every rank, whatever the barriers."""
    costs = uniform(place(SCHEDULES.get("1f1b"), p), (1.0, 1.0, 1.0, comm))
    return replace(costs, head=(head / p, 2 * head / p))


def shared(p: int, m: int, barriers: int, costs: Costs, name: str = "1f1b") -> SimulatedStep:
    return simulate(build(name, p, m, costs=costs, barriers=barriers), costs)


# p, m, head in T_F -> makespan with the head on the last rank, idle with one barrier and with two
PUBLISHED = {
    (4, 24, 0.3): (102.6, 8.7, 11.0),
    (8, 24, 0.6): (136.2, 20.7, 23.0),
    (8, 24, 0.15): (103.8, 20.925, 23.0),
}


@pytest.mark.parametrize(("p", "m", "head"), PUBLISHED)
def test_head_over_all_ranks_costs_the_idle_time_of_balanced_ones(p: int, m: int, head: float) -> None:
    makespan, one, two = PUBLISHED[p, m, head]
    base = costs_of(p)
    assert simulate(build("1f1b", p, m), with_head(base, head, p)).makespan == pytest.approx(makespan)
    runs = [shared(p, m, barriers, costs_of(p, head)) for barriers in (1, 2)]
    assert [run.work for run in runs] == pytest.approx([m * (3 + 3 * head / p)] * 2)
    assert [run.makespan - run.work for run in runs] == pytest.approx([one, two])
    assert [list(run.peak) for run in runs] == [[p + more - rank for rank in range(p)] for more in (1, 2)]


@pytest.mark.parametrize(("p", "m", "head"), PUBLISHED)
def test_split_backwards_idle_two_thirds_as_long(p: int, m: int, head: float) -> None:
    for barriers, more in ((1, 1), (2, 2)):
        costs = costs_of(p, head)
        split, whole = (shared(p, m, barriers, costs, name) for name in ("zb-h1", "1f1b"))
        assert list(split.peak) == [p + more] * p
        assert split.makespan - split.work <= 0.67 * (whole.makespan - whole.work)


@pytest.mark.parametrize(("p", "m", "head"), PUBLISHED)
def test_without_the_microbatch_more_ranks_idle_twice_as_long(p: int, m: int, head: float) -> None:
    """The best order with 1F1B's own peaks: F, T, S, B, each backward a microbatch earlier."""
    costs = costs_of(p, head)
    share = costs.forward[0] / costs.work(place(SCHEDULES.get("1f1b"), p))[0]
    lists = []
    for rank in range(p):
        late = floor((p - 1 - rank) * share + 0.5)
        lags = {"F": 0, "T": min(late + 1, p - rank), "S": late, "B": p - 1 - rank}
        order = [(kind, number - lag) for number in range(m + p) for kind, lag in lags.items()]
        lists.append(" ".join(f"{rank}{kind}{micro}" for kind, micro in order if 0 <= micro < m))
    run = simulate(check(parse("\n".join(lists))), costs)
    assert list(run.peak) == [p - rank for rank in range(p)]
    assert run.makespan - run.work == pytest.approx({4: 29.2, 8: 41.2}[p] if head != 0.15 else 42.55)


@pytest.mark.parametrize(("p", "m"), slow_unless(FEW, SIZES))
@pytest.mark.parametrize("barriers", [1, 2])
@pytest.mark.parametrize("name", TAKERS)
def test_every_rank_has_s_and_t_of_every_microbatch(name: str, barriers: int, p: int, m: int) -> None:
    for head in (0.05, 0.5 * p, 4.0 * p):
        run = shared(p, m, barriers, with_head(costs_of(p), head, p, barriers), name)
        for rank, cells in enumerate(run.schedule.table):
            found = sorted(action for action in flat(cells) if action.kind in HEAD)
            assert found == sorted(Action(rank, kind, micro) for kind in HEAD for micro in range(m))
        assert max(run.peak) <= min(m, p + barriers)
        assert run.makespan >= bound_of(run.schedule, run.costs) - 1e-9
        # a head on one rank takes longer as soon as it takes a good part of a rank's time
        alone = simulate(build(name, p, m), with_head(costs_of(p), head, p))
        assert m < p or head < p or run.makespan < alone.makespan


@pytest.mark.parametrize(("p", "m"), slow_unless(FEW, SIZES))
@pytest.mark.parametrize("barriers", [1, 2])
@pytest.mark.parametrize("name", TAKERS)
def test_no_table_with_sums_deadlocks_under_the_rules_of_nccl(name: str, barriers: int, p: int, m: int) -> None:
    for head in (0.05, 2.0 * p):
        costs = with_head(costs_of(p, comm=0.1), head, p, barriers)
        schedule = build(name, p, m, costs=costs, barriers=barriers)
        lowered, makespan = lower(schedule), simulate(schedule, costs).makespan
        for rules in ALL_RULES:
            # as fast as the simulator says, which knows no rules for messages, and none of the embedding: the first is
            # ahead of all, behind its first connection, and the last ones, at most p, behind all
            late = play(launches(lowered, costs), rules, costs.comm) - makespan
            assert -1e-9 <= late <= (p + 3) * costs.comm + 1e-9


def test_ranks_that_add_up_in_another_order_are_caught() -> None:
    lowered = lower(build("1f1b", 2, 4, barriers=1))
    first, second = Action(0, SUM_S, 1), Action(0, SUM_S, 2)
    names = {first: second, second: first}
    changed = tuple(names.get(cell, cell) for cell in lowered.table[0])
    with pytest.raises(MismatchError, match=r"sent 2, expected 1|sent 1, expected 2"):
        play(launches(replace(lowered, table=(changed, *lowered.table[1:]))), ALL_RULES[0])


@pytest.mark.parametrize("barriers", [1, 2])
def test_sums_are_in_the_same_order_on_all_ranks(barriers: int) -> None:
    lowered = lower(build("1f1b", 4, 6, barriers=barriers))
    for kind in SUMS:
        orders = {tuple(cell.micro for cell in cells if cell.kind == kind) for cells in lowered.table}
        assert orders == {tuple(range(6)) if kind != SUM_T or barriers == 2 else ()}
    for cells in lowered.table:
        assert cells[-1].kind == REDUCE or cells[-2].kind == REDUCE
        assert [cell.kind for cell in cells].count(SHARE) == 6


@pytest.mark.parametrize("barriers", [1, 2])
def test_tables_read_back(barriers: int) -> None:
    schedule = build("1f1b", 3, 5, barriers=barriers)
    assert parse(schedule.text(), schedule.name) == schedule
    assert parse(lower(schedule).text(), schedule.name) == lower(schedule)


GOOD = "0F0 0S0 0B0 0T0\n1F0 1S0 1B0 1T0"


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (("0S0 0B0 0T0", "0T0 0S0 0B0"), "rank 0, 0T0: runs before its S"),
        ((" 0T0", ""), "rank 0 never runs 0T0"),
        (("0S0", "0S0 0S0"), "rank 0, 0S0: runs twice"),
        (("0S0", "0S1"), "rank 0, 0S1: not an action of microbatches 0 to 0"),
        (("0F0 0S0 0B0", "0F0 0B0 0S0"), "deadlock: rank 0 at 0B0 for 1I0; rank 1 at 1B0 for 1F0 and 0S0 and 1S0"),
        (("1S0 1B0 1T0", "1S0 1T0 1B0"), "deadlock: rank 0 at 0B0 for 1I0; rank 1 at 1B0 for 1F0 and 0T0 and 1T0"),
    ],
)
def test_faults_are_named(broken: tuple[str, str], reason: str) -> None:
    assert check(parse(GOOD))
    with pytest.raises(BadSchedule) as caught:
        check(parse(GOOD.replace(*broken)))
    assert reason in str(caught.value).splitlines()[0]


def test_head_of_a_table_without_barriers_is_refused() -> None:
    schedule: Schedule = replace(parse(GOOD), barriers=0)
    with pytest.raises(BadSchedule, match="0S0: the LM head lies on the last rank"):
        check(schedule)


def test_a_hop_comes_before_every_meeting_of_other_ranks() -> None:
    costs = replace(costs_of(2, head=2.0, comm=0.5))
    run = shared(2, 1, 1, costs)
    both = zip(run.schedule.table, run.starts, strict=True)
    times = {str(cell): start for pair in both for cell, start in zip(*pair, strict=True)}
    # F 1, hop .5, F 1; S of rank 1 at once, that of rank 0 a hop later, and the sum after its end
    assert (times["1S0"], times["0S0"]) == (2.5, 3.0)
    assert times["1B0"] == 4.0 + 0.5


def test_each_meeting_takes_its_own_time() -> None:
    meeting = MeetingTimes(share=0.25, logits=0.125, gradient=1.0)
    makespans = []
    for barriers, head in {1: (0.6, 0.3), 2: (0.3, 0.6)}.items():
        costs = replace(costs_of(2, comm=0.5), head=head, meeting=meeting)
        makespans.append(shared(2, 1, barriers, costs).makespan)
    # F 1, hop .5, F 1, share .25, S .6 of rank 0, sum 1, B 2, hop .5, B 2, T .3; T of rank 1 is behind its B
    # F 1, hop .5, F 1, share .25, S .3 of rank 0, statistics .125, T .6, sum 1, B 2, hop .5, B 2
    assert makespans == pytest.approx([9.15, 9.275])


@pytest.mark.parametrize(("barriers", "last"), [(1, [5, 6, 7]), (2, [4, 5, 6, 7])])
def test_last_gradients_of_the_embedding_come_at_the_end(barriers: int, last: list[int]) -> None:
    # rank 0 of 4 runs S n - 2, and B n - 4 or n - 5 later in the round: its last S, of 7, is in round 9
    assert returned_before(build("1f1b", 4, 8, barriers=barriers).table[0])[None] == last


@pytest.mark.parametrize("name", [rule.name for rule in SCHEDULES if not rule.takes_vocabulary])
def test_rules_without_an_order_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} has no order for a vocabulary over all ranks; take 1f1b"):
        build(name, 4, 8, barriers=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"barriers": 3}, "takes 1 or 2 barriers, got 3"),
        ({"barriers": 1, "slices": 2}, "takes whole sequences, got 2 slices"),
        ({"barriers": 1, "moves": Offload(2)}, "keeps activations where they are, got a limit of 2 chunks"),
    ],
)
def test_what_cannot_go_together_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("1f1b", 4, 8, **options)


def test_a_head_takes_no_time_below_zero() -> None:
    with pytest.raises(ValueError, match="the time of the LM head cannot be negative, got -1"):
        with_head(costs_of(2), -1.0, 2)


def test_a_table_file_with_s_and_t_is_not_trained(tmp_path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text(GOOD)
    with pytest.raises(ValueError, match="has S and T of a vocabulary over all ranks, which only simulate plays"):
        SCHEDULES.get(f"table:{file}")
