"""Steps without a flush: whole runs are complete tables, each batch runs on its version, and no message deadlocks."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from megatron_cp.pipeline import SCHEDULES
from megatron_cp.pipeline.action import BACKWARD, FORWARD, flat
from megatron_cp.pipeline.bounds import bound_of
from megatron_cp.pipeline.build import build
from megatron_cp.pipeline.costs import uniform
from megatron_cp.pipeline.execute import lower
from megatron_cp.pipeline.offload import Offload
from megatron_cp.pipeline.passes import check
from megatron_cp.pipeline.schedule import BadSchedule, Schedule, parse
from megatron_cp.pipeline.schedules.pipedream import USUAL, StepOfRun
from megatron_cp.pipeline.simulate import simulate
from megatron_cp.pipeline.steady import free_step
from tests.nccl import Tally
from tests.pipeline.executed import Stale, inputs_of, layer, weight_of
from tests.pipeline.launches import launches

NAMES = [rule.name for rule in SCHEDULES if rule.delay]
RANKS = range(2, 17)
UNIT = (1.0, 1.0, 1.0, 0.0)


def delay_of(name: str, p: int, m: int):
    return SCHEDULES.get(name).delay(p, m)


def sizes(name: str, p: int) -> list[int]:
    """Numbers of microbatches: one, few and many, from the fewest that the schedule takes."""
    few = (1, p - 1, p) if p > 8 else (1, 2, p - 1, p, 2 * p + 1)
    return sorted({m for m in few if name != "2bw" or m >= p - 1})


def full_after(p: int, m: int) -> int:
    """Steps after which every rank is as far ahead as it will be."""
    return -(-(p - 1) // m)


def steps_of(name: str, p: int, m: int, count: int) -> list[Schedule]:
    return [build(name, p, m, step=StepOfRun(number == 0, count - number)) for number in range(count)]


def joined(steps: list[Schedule]) -> Schedule:
    """The steps of a run one after the other, without a barrier, as one table."""
    first = steps[0]
    table = [
        tuple(
            action if action.micro is None else action._replace(micro=action.micro + number * first.micros)
            for number, step in enumerate(steps)
            for action in flat(step.table[rank])
        )
        for rank in range(first.placement.ranks)
    ]
    return replace(first, micros=first.micros * len(steps), table=tuple(table), before=(), after=())


@pytest.mark.parametrize("p", RANKS)
@pytest.mark.parametrize("name", NAMES)
def test_a_whole_run_is_a_complete_table_and_every_forward_has_its_weights(name, p):
    for m in sizes(name, p):
        delay = delay_of(name, p, m)
        # a forward that runs ahead of the next updates needs none of them
        assert all(ahead <= behind * m for ahead, behind in zip(*delay, strict=True))
        for count in (1, 2, full_after(p, m) + 1):
            steps = steps_of(name, p, m, count)
            for step, following in pairwise(steps):
                assert step.after == following.before
            assert not any(steps[0].before)
            assert not any(steps[-1].after)
            assert check(joined(steps))
            for number, step in enumerate(steps):
                # all backwards of one batch, and no others
                for cells in step.table:
                    assert [action.micro for action in flat(cells) if action.kind in BACKWARD] == [*range(m)]
                updates = number
                for rank, cells in enumerate(step.table):
                    batches = {number + action.micro // m for action in flat(cells) if action.kind == FORWARD}
                    assert all(max(batch - delay.behind[rank], 0) <= updates for batch in batches)


@pytest.mark.parametrize("p", RANKS)
def test_updates_that_weights_lack_are_the_papers(p):
    assert delay_of("2bw", p, p).behind == (1,) * p
    assert delay_of("2bw", p, p).versions == (2,) * p
    assert delay_of("pipedream", p, 1).behind == tuple(range(p - 1, -1, -1))
    assert delay_of("pipedream", p, 1).versions == tuple(p - rank for rank in range(p))
    assert delay_of("pipedream", p, p - 1).behind == (*(1,) * (p - 1), 0)
    assert delay_of("pipedream-vertical", p, 1).versions == (p,) * p
    for name in NAMES:
        assert delay_of(name, p, p).ahead == tuple(range(p - 1, -1, -1))


@pytest.mark.parametrize("p", RANKS)
@pytest.mark.parametrize("name", NAMES)
def test_time_of_a_step_with_and_without_waiting_for_the_update(name, p):
    for m in sizes(name, p):
        for forward, back in ((1.0, 2.0), (1.0, 1.0)):
            times = (forward, back / 2, back / 2, 0.0)
            usual = build(name, p, m)
            costs = uniform(usual.placement, times)
            run = simulate(usual, costs)
            assert run.makespan == m * (forward + back) + (p - 1) * back
            assert run.peak == tuple(p - rank for rank in range(p))
            # without a barrier every further step takes its work alone
            counts = full_after(p, m) + 2, full_after(p, m) + 1
            longer, shorter = (simulate(joined(steps_of(name, p, m, count)), costs) for count in counts)
            assert longer.makespan - shorter.makespan == pytest.approx(m * (forward + back), rel=1e-12)
            assert bound_of(usual, costs) == m * (forward + back)
            assert free_step(usual, costs) == pytest.approx(m * (forward + back), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "p", "m", "barrier", "free"),
    [
        ("2bw", 4, 8, (30, 19), (24, 16)),
        ("2bw", 4, 24, (78, 51), (72, 48)),
        ("2bw", 8, 8, (38, 23), (24, 16)),
        ("2bw", 8, 24, (86, 55), (72, 48)),
        ("pipedream", 4, 1, (9, 5), (3, 2)),
        ("pipedream", 8, 1, (17, 9), (3, 2)),
    ],
)
def test_figures_of_a_step_with_and_without_a_barrier(name, p, m, barrier, free):
    usual = build(name, p, m)
    both = [uniform(usual.placement, times) for times in (UNIT, (1.0, 0.5, 0.5, 0.0))]
    assert tuple(simulate(usual, costs).makespan for costs in both) == barrier
    assert tuple(free_step(usual, costs) for costs in both) == pytest.approx(free, rel=1e-12)


@pytest.mark.parametrize(
    ("p", "hop", "slow"), [(2, 0.0, 0), (3, 0.5, 2), (4, 0.0, 1), (4, 0.5, 4), (5, 0.25, 2), (7, 0.1, 3), (8, 0.5, 7)]
)
def test_a_long_run_of_uneven_ranks_and_hops_takes_the_time_of_free_steps(p, hop, slow):
    usual = build("pipedream", p, p)
    uneven = tuple(1.5 if rank in (slow, slow + 1) else 1.0 for rank in range(p))
    costs = replace(uniform(usual.placement, (1.0, 1.0, 1.0, hop)), forward=uneven)
    first = build("pipedream", p, p, step=StepOfRun(first=True))
    longer, shorter = (simulate(joined([first, *[usual] * count]), costs).makespan for count in (40, 20))
    assert longer - shorter == pytest.approx(20 * free_step(usual, costs), rel=1e-9)
    assert free_step(usual, costs) < simulate(usual, costs).makespan


def test_lists_of_the_first_the_usual_and_the_last_step():
    lines = [build("2bw", 4, 4, step=step).text().splitlines() for step in (StepOfRun(True), USUAL, StepOfRun(left=1))]
    assert lines[0][0] == "0F0 0F1 0F2 0F3 0B0 0F4 0B1 0F5 0B2 0F6 0B3"
    assert lines[1] == [
        "0F3 0B0 0F4 0B1 0F5 0B2 0F6 0B3",
        "1F2 1B0 1F3 1B1 1F4 1B2 1F5 1B3",
        "2F1 2B0 2F2 2B1 2F3 2B2 2F4 2B3",
        "3F0 3B0 3F1 3B1 3F2 3B2 3F3 3B3",
    ]
    assert lines[2][0] == "0F3 0B0 0B1 0B2 0B3"


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (("0F3 ", "0F2 "), "rank 0, 0F2: runs twice"),
        (("0F6 ", "0F7 "), "rank 0, 0F7: not a compute action of microbatches 0 to 6"),
        (("0F6 ", ""), "rank 0 never runs 0F6"),
        (("3F3 3B3", "3F3 3B4"), "rank 3, 3B4: not a compute action of microbatches 0 to 3"),
    ],
)
def test_faults_of_open_tables_are_named(broken, reason):
    usual = build("2bw", 4, 4)
    table = parse(usual.text().replace(*broken)).table
    with pytest.raises(BadSchedule) as caught:
        check(replace(usual, table=table))
    assert reason in str(caught.value).splitlines()[0]


@pytest.mark.parametrize("p", [2, 3, 4])
@pytest.mark.parametrize("name", NAMES)
def test_no_step_and_no_run_deadlocks(name: str, p: int, tally: Tally) -> None:
    for m in sizes(name, p):
        steps = [lower(step) for step in steps_of(name, p, m, 4)]
        for step in [lower(build(name, p, m)), *steps]:
            tally.play(launches(step))
        tally.play(launches(joined(steps)))


@pytest.mark.slow
@pytest.mark.parametrize("p", range(5, 9))
@pytest.mark.parametrize("name", NAMES)
def test_no_step_deadlocks_at_any_size(name: str, p: int, tally: Tally) -> None:
    test_no_step_and_no_run_deadlocks(name, p, tally)


RATE = 0.05


@pytest.mark.parametrize(("name", "p", "m"), [(name, p, m) for name in NAMES for p in (2, 4) for m in sizes(name, p)])
def test_every_batch_runs_on_its_version(name, p, m):
    """Losses and weights equal those of one rank that keeps all weights it has ever had, bit for bit."""
    count, delay = 5, delay_of(name, p, m)
    run = Stale(delay, p, m, RATE)
    losses = run.train([lower(step) for step in steps_of(name, p, m, count)])
    histories = [[weight_of(stage)] for stage in range(p)]
    for batch in range(count):
        used = [history[max(batch - behind, 0)] for history, behind in zip(histories, delay.behind, strict=True)]
        totals = [torch.zeros_like(weight) for weight in used]
        for micro in range(m):
            made = inputs_of(count * m)[batch * m + micro]
            for weight in used:
                made = layer(made, weight)
            loss = made.square().sum()
            assert losses[batch * m + micro] == loss.item()
            for total, gradient in zip(totals, torch.autograd.grad(loss, used), strict=True):
                total += gradient
        for history, total in zip(histories, totals, strict=True):
            history.append((history[-1].detach() - RATE * total).requires_grad_())
    for stage, history in enumerate(histories):
        assert torch.equal(run.newest(stage), history[-1])
    assert run.in_flight == [list(step.after) for step in steps_of(name, p, m, count)]


def test_what_has_no_order_is_refused():
    with pytest.raises(ValueError, match="2bw needs m of at least p - 1 = 3 microbatches, got m = 2; take more"):
        build("2bw", 4, 2)
    with pytest.raises(ValueError, match="pipedream keeps activations from one step to the next"):
        build("pipedream", 4, 4, moves=Offload(2))
    with pytest.raises(ValueError, match="2bw has no order for 2 slices of a sequence"):
        build("2bw", 4, 4, slices=2)
    with pytest.raises(ValueError, match="2bw has v = 1, got v = 2"):
        build("2bw", 4, 4, 2)
