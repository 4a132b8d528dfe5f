"""A new schedule is one file with a rule and one entry of the registry, as docs/extending says."""

import pytest
import torch

from megatron_cp import pipeline
from megatron_cp.pipeline import SCHEDULES
from megatron_cp.pipeline.bounds import lower_bound
from megatron_cp.pipeline.build import build
from megatron_cp.pipeline.costs import uniform
from megatron_cp.pipeline.execute import lower
from megatron_cp.pipeline.schedule import parse
from megatron_cp.pipeline.simulate import simulate
from megatron_cp.registry import Registry
from tests.examples.my_schedule import RULE
from tests.nccl import ALL_RULES, play
from tests.pipeline.executed import execute, sequential
from tests.pipeline.launches import launches
from tests.pipeline.played import UNIT


@pytest.fixture(autouse=True)
def entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more entry, as a line in the list of `megatron_cp.pipeline` would add it."""
    extended = Registry(SCHEDULES.kind, [*SCHEDULES, RULE])
    monkeypatch.setattr(SCHEDULES, "__dict__", extended.__dict__)
    assert pipeline.SCHEDULES.get("two-and-two") is RULE


@pytest.mark.parametrize(("p", "m"), [(2, 3), (3, 6), (4, 8)])
def test_it_is_checked_simulated_and_executed(p: int, m: int) -> None:
    schedule = build("two-and-two", p, m)
    assert parse(schedule.text(), schedule.name) == schedule

    costs = uniform(schedule.placement, UNIT)
    run = simulate(schedule, costs)
    assert run.makespan >= lower_bound(schedule.placement, m, costs)
    assert max(run.peak) <= 2 * p

    for rules in ALL_RULES:
        play(launches(lower(schedule)), rules)

    losses, gradients = sequential(schedule.placement, m)
    ranks = execute(lower(schedule))
    assert {micro: loss for layers in ranks for micro, loss in layers.losses.items()} == losses
    for layers in ranks:
        assert all(torch.equal(gradient, gradients[stage]) for stage, gradient in layers.gradients.items())


def test_it_is_known_by_name_and_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'two-and-two'"):
        build("two-and-tow", 2, 4)
    with pytest.raises(ValueError, match="two-and-two has v = 1, got v = 2"):
        build("two-and-two", 2, 4, 2)


def test_the_automatic_schedule_is_never_worse() -> None:
    schedule = build("two-and-two", 4, 8)
    costs = uniform(schedule.placement, UNIT)
    assert simulate(build("auto", 4, 8, costs=costs), costs).makespan <= simulate(schedule, costs).makespan
