"""Two pipes in opposite directions: figures of Chimera, laws for every size, the sync, and what is refused."""

from dataclasses import replace

import pytest
import torch

from megatron_cp.pipeline import SCHEDULES
from megatron_cp.pipeline.action import BACKWARD, FORWARD, SEND_B, SEND_F, flat
from megatron_cp.pipeline.bounds import bound_of, least_memory
from megatron_cp.pipeline.build import build, place
from megatron_cp.pipeline.costs import uniform
from megatron_cp.pipeline.execute import forward_only, lower
from megatron_cp.pipeline.offload import Offload
from megatron_cp.pipeline.passes import add_reductions, add_transfers, check, merge
from megatron_cp.pipeline.placement import Placement, two_way, vee
from megatron_cp.pipeline.profile import lower_split
from megatron_cp.pipeline.schedule import BadSchedule, Schedule, parse
from megatron_cp.pipeline.schedules.chimera import chimera, chimera_zb
from megatron_cp.pipeline.simulate import SimulatedStep, simulate
from megatron_cp.pipeline.vocabulary import with_head
from tests.cases import slow_unless
from tests.nccl import ALL_RULES, play
from tests.pipeline.executed import execute, sequential
from tests.pipeline.launches import launches
from tests.pipeline.played import UNIT, played
from tests.pipeline.test_tables import blocking

TWO = [rule.name for rule in SCHEDULES if rule.two_copies]
EVEN = range(2, 17, 2)
HALVES = (1.0, 0.5, 0.5, 0.0)
"""Times of a rank whose whole backward takes as long as its forward."""
SIZES = [(p, m) for p in EVEN for m in (2 * p, 2 * p + 2)]
PLAYED = slow_unless([(2, 4), (4, 8)], [(2, 4), (4, 8), (4, 10), (6, 14), (8, 16)])


def run_of(p: int, m: int, orders: list, times: tuple[float, ...] = UNIT) -> SimulatedStep:
    schedule = check(Schedule("two pipes", two_way(p), m, tuple(map(tuple, orders))))
    return simulate(schedule, uniform(schedule.placement, times))


def idle(run: SimulatedStep) -> float:
    return run.makespan - run.work


# p, m -> idle for T_F = T_B, for T_B = 2 T_F with p/2 and with p/2 + 1 in flight, and with W apart; peak with W apart
FIGURES = {
    (4, 4): (2, 4, 4, 1, 4),
    (4, 8): (2, 10, 5, 1, 5),
    (4, 24): (2, 34, 9, 1, 5),
    (8, 8): (6, 12, 12, 3, 8),
    (8, 16): (6, 30, 17, 3, 9),
    (8, 24): (6, 35, 22, 3, 9),
}


@pytest.mark.parametrize(("p", "m"), FIGURES)
def test_idle_time_of_chimera(p: int, m: int) -> None:
    equal, half, more, apart, peak = FIGURES[p, m]
    even = run_of(p, m, chimera(p, m, backward=1, flight=p // 2), HALVES)
    assert idle(even) == equal
    assert even.peak == tuple(p - max(rank, p - 1 - rank) + p // 2 for rank in range(p))
    assert idle(run_of(p, m, chimera(p, m, flight=p // 2))) == half
    assert idle(played("chimera", p, m)) == more
    split = played("chimera-zb", p, m)
    assert (idle(split), max(split.peak)) == (apart, peak)


def test_the_papers_picture_of_four_ranks() -> None:
    orders = [" ".join(map(str, order)) for order in chimera(4, 4, backward=1, flight=2)]
    assert orders[0] == "0F0 0F1 7F2 7B2 7F3 7B3 0B0 0B1"
    assert orders[1] == "1F0 6F2 1F1 6F3 6B2 1B0 6B3 1B1"


@pytest.mark.parametrize("p", EVEN)
def test_chimera_idles_half_as_long_as_1f1b_where_passes_take_the_same(p: int) -> None:
    for m in (p, 2 * p):
        assert idle(run_of(p, m, chimera(p, m, backward=1, flight=p // 2), HALVES)) == p - 2
    assert idle(played("1f1b", p, p, HALVES)) == 2 * (p - 1)
    assert idle(played("chimera", p, p)) == 2 * (p - 2)


@pytest.mark.parametrize("p", EVEN)
def test_with_w_apart_the_ranks_in_the_middle_never_wait_again(p: int) -> None:
    """They start p / 2 - 1 forwards late and have no other idle time: half a unit less than on the V."""
    for m in (p, 2 * p, 2 * p + 4):
        # the order is no best one there
        late = 2 if (p, m) == (16, 32) else 0
        run = run_of(p, m, chimera_zb(p, m))
        assert (idle(run), max(run.peak)) == (p / 2 - 1 + late, min(m, p + 1))
        assert run.makespan == bound_of(run.schedule, run.costs) + late
    assert idle(played("zb-v", p, 2 * p)) == (p - 1) / 2


@pytest.mark.parametrize("p", EVEN)
def test_two_ranks_of_dualpipe_do_what_one_of_dualpipe_v_does(p: int) -> None:
    m = 2 * p + 2
    run = played("dualpipe", p, m)
    assert (idle(run), max(run.peak)) == (p / 2 - 1, p + 1)
    if p > 2:
        folded = build("dualpipe-v", p // 2, m // 2).table
        chunk = {stage: number for stages in vee(p // 2).of_rank for number, stage in enumerate(stages)}
        for rank, cells in enumerate(run.schedule.table):
            from_end, (down, up) = min(rank, p - 1 - rank), run.schedule.placement.of_rank[rank]
            near = down if rank < p // 2 else up
            start = {stage: run.schedule.micros_of(stage).start for stage in (down, up)}
            found = [(a.stage != near, a.kind, a.micro - start[a.stage]) for a in flat(cells)]
            assert found == [(bool(chunk[a.stage]), a.kind, a.micro) for a in flat(folded[from_end])]


@pytest.mark.parametrize(("p", "m"), SIZES)
@pytest.mark.parametrize("name", TWO)
def test_every_microbatch_goes_one_way_through_one_copy(name: str, p: int, m: int) -> None:
    run = played(name, p, m)
    schedule, where = run.schedule, run.schedule.placement
    for stage, rank in enumerate(where.rank_of):
        mine = [action for action in flat(schedule.table[rank]) if action.stage == stage]
        half = range(m // 2) if stage < p else range(m // 2, m)
        for kinds in ({FORWARD}, BACKWARD):
            assert [action.micro for action in mine if action.kind in kinds] == list(half)
    assert parse(schedule.text(), schedule.name) == schedule
    assert run.makespan >= bound_of(schedule, run.costs) - 1e-9
    sent = [a for cells in lower(schedule).table for a in flat(cells) if a.kind in (SEND_F, SEND_B)]
    assert len(sent) == run.transfers == 2 * (p - 1) * m
    assert {a.stage for a in sent if a.kind == SEND_F} == set(range(2 * p)) - {p - 1, 2 * p - 1}


@pytest.mark.parametrize("m", [2, 4, 6])
@pytest.mark.parametrize("p", EVEN)
def test_chimera_has_an_order_for_every_even_number_of_microbatches(p: int, m: int) -> None:
    for name in ("chimera", "chimera-zb"):
        assert max(played(name, p, m).peak) <= min(m, p + 1)


@pytest.mark.parametrize(("p", "m"), PLAYED)
@pytest.mark.parametrize("name", TWO)
def test_no_table_of_two_pipes_deadlocks(name: str, p: int, m: int) -> None:
    """Under the rules of NCCL in all connection modes a step takes no longer than the simulator says."""
    schedule = build(name, p, m)
    costs = uniform(schedule.placement, (1.0, 1.2, 0.8, 0.1))
    written = add_transfers(add_reductions(merge(schedule)))
    assert blocking(written) == sum(map(len, written.table))
    lowered = lower(schedule)
    makespan = simulate(schedule, costs).makespan
    for rules in ALL_RULES:
        seconds = play(launches(lowered, costs), rules, costs.comm)
        assert rules.one_queue or seconds == pytest.approx(makespan, rel=1e-12)
        for table in (lower_split(schedule), forward_only(schedule.placement, m)):
            play(launches(table), rules)


@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("name", TWO)
def test_gradients_of_both_copies_add_up_to_those_of_one_rank(name: str, p: int) -> None:
    schedule = build(name, p, 2 * p)
    losses, gradients = sequential(schedule.placement, schedule.micros)
    ranks = execute(lower(schedule))
    assert {micro: loss for layers in ranks for micro, loss in layers.losses.items()} == losses
    found = {stage: gradient for layers in ranks for stage, gradient in layers.gradients.items()}
    for part, expected in gradients.items():
        torch.testing.assert_close(found[part] + found[p + part], expected, rtol=0, atol=1e-12)
    evaluated = execute(forward_only(schedule.placement, 2 * p), training=False)
    assert {micro: loss for layers in evaluated for micro, loss in layers.losses.items()} == losses


def test_one_microbatch_in_each_pipe_is_bit_equal() -> None:
    schedule = build("chimera", 2, 2)
    _, gradients = sequential(schedule.placement, 2)
    found = {stage: gradient for layers in execute(lower(schedule)) for stage, gradient in layers.gradients.items()}
    assert all(torch.equal(found[part] + found[2 + part], gradients[part]) for part in gradients)


# sync of the copies, costs, memory


@pytest.mark.parametrize("name", TWO)
def test_a_step_ends_when_the_gradients_of_both_copies_are_added_up(name: str) -> None:
    alone = played(name, 4, 8)
    synced = simulate(alone.schedule, replace(alone.costs, sync=2.0))
    # one sum at least comes behind the last gradient; every rank has two
    assert alone.makespan + 2 <= synced.makespan <= alone.makespan + 4
    assert (synced.starts, synced.ends) == (alone.starts, alone.ends)


def test_sums_of_two_ranks_do_not_run_at_the_same_time() -> None:
    schedule = check(parse("0F0 3F1 3B1 0B0\n2F1 1F0 1B0 2B1"))
    costs = replace(uniform(schedule.placement, UNIT), sync=5.0)
    # part 1 is complete on both ranks when rank 0 has run 3B1 and rank 1 1B0: not before the others, part 0
    last = {
        str(cell): end
        for pair in zip(schedule.table, simulate(schedule, costs).ends, strict=True)
        for cell, end in zip(*pair, strict=True)
    }
    first = max(last["3B1"], last["1B0"])
    second = max(last["0B0"], last["2B1"])
    assert (first, second) == (4.0, 6.0)
    assert simulate(schedule, costs).makespan == first + 5 + 5


def test_a_head_lies_behind_the_last_stage_of_each_pipe() -> None:
    costs = with_head(uniform(two_way(4), UNIT), 0.5, 4, pipes=2)
    assert costs.forward == (1, 1, 1, 1.5) * 2
    assert costs.work(two_way(4)) == [3 + 0.75, 3, 3, 3 + 0.75]


def test_a_rank_of_two_pipes_keeps_one_microbatch_of_one_of_them_at_least() -> None:
    assert least_memory(two_way(4), uniform(two_way(4), UNIT, (3.0, 2.0))) == 1.0


def test_moves_of_activations_go_with_two_pipes() -> None:
    schedule = build("chimera", 4, 8, moves=Offload(3))
    run = simulate(schedule, uniform(schedule.placement, UNIT, move=0.5))
    assert run.moved > 0
    assert max(run.peak) <= 3


def test_two_pipes_and_the_v_are_told_apart_by_their_microbatches() -> None:
    assert two_way(4).rank_of == vee(4).rank_of
    assert parse(build("zb-v", 4, 8).text()).placement == vee(4)
    assert parse(build("chimera-zb", 4, 8).text()).placement == two_way(4)
    assert two_way(2, 2) == Placement("two-way", (0, 1, 0, 1, 1, 0, 1, 0), pipes=2)


# what is refused


@pytest.mark.parametrize("name", TWO)
def test_sizes_without_two_equal_pipes_are_refused(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"need an even number of ranks, got p = 5: the rank in the middle .* take zb-v"
    ):
        build(name, 5, 10)
    with pytest.raises(
        ValueError, match="half of the microbatches go down the ranks and half go up, got m = 9; take 10"
    ):
        build(name, 4, 9)
    with pytest.raises(ValueError, match=f"{name} has v = 1, got v = 2"):
        build(name, 4, 8, 2)


def test_dualpipe_names_the_nearest_number_of_microbatches() -> None:
    with pytest.raises(
        BadSchedule, match="dualpipe: has no valid table for p = 8, m = 8, v = 1; the nearest m that works"
    ):
        build("dualpipe", 8, 8)


def test_a_microbatch_of_the_other_pipe_is_refused() -> None:
    text = "0F0 3F1 3B1 0B0\n2F1 1F0 1B0 2B1"
    assert check(parse(text)).placement.pipes == 2
    schedule = replace(parse(text), micros=4)
    with pytest.raises(BadSchedule, match="0F2: not a compute action of microbatches 0 to 1"):
        check(replace(schedule, table=(parse("0F2 0B2\n1F2 1B2").table[0], schedule.table[1])))


@pytest.mark.parametrize("name", TWO)
def test_a_file_with_two_pipes_is_simulated_alone(name: str, tmp_path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text(build(name, 4, 8).text())
    with pytest.raises(ValueError, match="has two pipes in opposite directions, which only simulate plays"):
        SCHEDULES.get(f"table:{file}")


def test_auto_puts_its_stages_on_no_two_pipes() -> None:
    with pytest.raises(ValueError, match="unknown placement 'two-way'; known: loop, v"):
        place(SCHEDULES.get("auto"), 4, placement="two-way")
