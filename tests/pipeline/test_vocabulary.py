"""The LM head over all ranks of a pipeline: published figures, laws for every size, and what is refused."""

import re
from dataclasses import replace
from math import floor

import pytest

from megatron_cp.pipeline import SCHEDULES
from megatron_cp.pipeline.action import HEAD, REDUCE, SHARE, SUM_S, SUM_T, SUMS, Action, flat
from megatron_cp.pipeline.bounds import bound_of
from megatron_cp.pipeline.build import build, place
from megatron_cp.pipeline.costs import Costs, MeetingTimes, uniform
from megatron_cp.pipeline.execute import forward_only, lower
from megatron_cp.pipeline.offload import Offload
from megatron_cp.pipeline.passes import check
from megatron_cp.pipeline.placement import Placement, loop, vee
from megatron_cp.pipeline.schedule import BadSchedule, Schedule, parse
from megatron_cp.pipeline.simulate import SimulatedStep, simulate
from megatron_cp.pipeline.vocabulary import returned_before, with_head
from megatron_cp.pipeline.vocabulary_order import with_vocabulary
from tests.cases import slow_unless
from tests.nccl import ALL_RULES, MismatchError, play
from tests.pipeline.launches import launches

TAKERS = [rule.name for rule in SCHEDULES if not rule.no_vocabulary]
SIZES = [(2, 2), (2, 5), (3, 7), (4, 4), (4, 12), (5, 6), (6, 7), (7, 7), (8, 8)]


def has_table(name: str, p: int, m: int) -> bool:
    try:
        return bool(build(name, p, m))
    except ValueError:
        return False


CASES = slow_unless(
    [(name, barriers, *size) for name in ("1f1b", "interleaved", "zb-v") for barriers in (1, 2) for size in SIZES[:3]],
    [(name, barriers, p, m) for name in TAKERS for p, m in SIZES if has_table(name, p, m) for barriers in (1, 2)],
)


def costs_of(p: int, head: float = 0.0, comm: float = 0.0, name: str = "1f1b") -> Costs:
    """Costs with T_B = 2 T_F whose logits take a third of the head on every rank, whatever the barriers."""
    costs = uniform(place(SCHEDULES.get(name), p), (1.0, 1.0, 1.0, comm))
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
@pytest.mark.parametrize("name", ["zb-h1", "interleaved", "gis", "zb-v", "v-half"])
def test_other_tables_idle_as_balanced_ranks_do_or_twice_as_long(name: str, p: int, m: int, head: float) -> None:
    plain = costs_of(p, name=name)
    without = simulate(build(name, p, m), plain)
    alone = simulate(without.schedule, with_head(plain, head, p))
    # a microbatch takes longer; at most twice as long as with balanced ranks of one without a head, and a forward
    idle = 2 * (without.makespan - without.work) * (3 + 3 * head / p) / 3 + 1
    for barriers in (1, 2):
        run = shared(p, m, barriers, with_head(plain, head, p, barriers), name)
        assert run.makespan - run.work <= idle
        assert head < 0.3 or run.makespan < alone.makespan
        assert max(run.peak) <= max(without.peak) + barriers


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


@pytest.mark.parametrize(("name", "barriers", "p", "m"), CASES)
def test_every_rank_has_s_and_t_of_every_microbatch(name: str, barriers: int, p: int, m: int) -> None:
    plain = build(name, p, m)
    before = simulate(plain, costs_of(p, name=name)).peak
    for head in (0.05, 4.0 * p):
        run = shared(p, m, barriers, with_head(costs_of(p, name=name), head, p, barriers), name)
        for stages, cells in zip(plain.placement.of_rank, run.schedule.table, strict=True):
            found = sorted(action for action in flat(cells) if action.kind in HEAD)
            assert found == sorted(Action(stages[0], kind, micro) for kind in HEAD for micro in range(m))
            for kind in HEAD:
                assert [action.micro for action in flat(cells) if action.kind == kind] == [*range(m)]
        assert all(after <= most + barriers for after, most in zip(run.peak, before, strict=True))
        assert run.makespan >= bound_of(run.schedule, run.costs) - 1e-9
        # a head on one rank takes longer as soon as it takes a good part of a rank's time
        alone = simulate(plain, with_head(costs_of(p, name=name), head, p))
        assert m < p or head < p or run.makespan < alone.makespan


@pytest.mark.parametrize(("name", "barriers", "p", "m"), CASES)
def test_no_table_with_sums_deadlocks_under_the_rules_of_nccl(name: str, barriers: int, p: int, m: int) -> None:
    plain = build(name, p, m)
    for head in (0.05, 2.0 * p) if p < 5 else (2.0 * p,):
        costs = with_head(costs_of(p, comm=0.1, name=name), head, p, barriers)
        schedule = build(name, p, m, costs=costs, barriers=barriers)
        lowered, makespan = lower(schedule), simulate(schedule, costs).makespan
        alone = simulate(plain, with_head(costs_of(p, comm=0.1, name=name), head, p)).makespan
        for rules in ALL_RULES:
            took = play(launches(lowered, costs), rules, costs.comm)
            if name == "1f1b":
                # as fast as the simulator says, which knows no rules for messages, and none of the embedding: the first
                # is ahead of all, behind its first connection, and the last ones, at most p, behind all
                assert -1e-9 <= took - makespan <= (p + 3) * costs.comm + 1e-9
            assert head < p or m < 2 * p or took < alone


@pytest.mark.parametrize("placement", [loop(2), loop(4), loop(3, 2), vee(2), vee(4), vee(5)], ids=str)
def test_no_evaluation_deadlocks(placement: Placement) -> None:
    for m in (1, placement.ranks, 2 * placement.ranks + 1):
        lowered = forward_only(placement, m, barriers=1)
        for rules in ALL_RULES:
            play(launches(lowered), rules)
        for cells in lowered.table:
            assert [cell.micro for cell in cells if cell.kind == SUM_S] == [*range(m)]


@pytest.mark.parametrize("barriers", [1, 2])
@pytest.mark.parametrize("name", ["interleaved", "zb-v"])
def test_one_late_forward_of_a_chunk_is_room_for_a_barrier(name: str, barriers: int) -> None:
    """Several chunks have shorter passes, and need less than a whole microbatch more."""
    costs = with_head(costs_of(4, name=name), 2.0, 4, barriers)
    most, before = (
        max(shared(4, 24, barriers, costs, name).peak),
        max(simulate(build(name, 4, 24), costs_of(4, name=name)).peak),
    )
    assert before < most <= before + 1


def test_tables_of_another_number_of_microbatches_are_asked_for_once() -> None:
    """A long step is placed as the best of some short ones."""
    asked = []

    def make(m: int) -> Schedule:
        asked.append(m)
        return build("zb-v", 2, m)

    assert with_vocabulary(make, 21, 1, None).micros == 21
    assert asked == [21, 5]


def test_a_table_that_waits_for_itself_is_refused() -> None:
    broken = parse("0F0 0B0 0F1 0B1\n1F0 1B0 1F1 1B1")
    backwards = replace(broken, table=(broken.table[0][::-1], broken.table[1]))
    with pytest.raises(ValueError, match="has no place for S and T of 2 microbatches; take another number"):
        with_vocabulary(lambda m: backwards, 2, 1, None)


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


@pytest.mark.parametrize("name", [rule.name for rule in SCHEDULES if rule.no_vocabulary])
def test_rules_without_a_place_are_refused(name: str) -> None:
    reason = re.escape(SCHEDULES.get(name).no_vocabulary or "")
    with pytest.raises(ValueError, match=f"{name} has no place for a vocabulary over all ranks, for it {reason}; take"):
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


def test_a_forward_that_overlaps_a_backward_is_refused() -> None:
    with pytest.raises(ValueError, match="no place beside forwards that overlap backwards; leave one out"):
        build("dualpipe-v", 4, 8, barriers=1, overlapped=True)


def test_a_cap_holds_for_the_table_with_s_and_t() -> None:
    costs = costs_of(4, 1.0, name="zb-v")
    assert build("zb-v", 4, 8, costs=costs, caps=[5.0] * 4, barriers=1)
    with pytest.raises(ValueError, match=r"a cap of 4 M_B is below the minimum 4\.5 M_B of zb-v"):
        build("zb-v", 4, 8, costs=costs, caps=[4.0] * 4, barriers=1)


def test_a_head_takes_no_time_below_zero() -> None:
    with pytest.raises(ValueError, match="the time of the LM head cannot be negative, got -1"):
        with_head(costs_of(2), -1.0, 2)


def test_a_table_file_with_s_and_t_is_not_trained(tmp_path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text(GOOD)
    with pytest.raises(ValueError, match="has S and T of a vocabulary over all ranks, which only simulate plays"):
        SCHEDULES.get(f"table:{file}")
