"""Every algorithm's plan can run, is the same on every rank, and no plan is below the bound."""

import itertools
import time
from dataclasses import replace

import hypothesis
import pytest
from hypothesis import given

import megatron_cp.batches.plan as plan_module
from megatron_cp.batches import ALGORITHMS
from megatron_cp.batches.plan import BatchPlan, RankGroup, Share, check_plan, placed
from megatron_cp.batches.steps import plan_batch
from megatron_cp.batches.timing import lower_bound
from megatron_cp.corpus.mixes import MIXES
from megatron_cp.errors import Refused
from tests.batches.problems import mix, problem, random_problems
from tests.cases import slow_unless

laws = hypothesis.settings(max_examples=15, derandomize=True, deadline=None, database=None)
more = hypothesis.settings(max_examples=150, derandomize=True, deadline=None, database=None)
algorithms = pytest.mark.parametrize("name", ALGORITHMS.names)


def runs(plan):
    """Check a plan by its own words, not by `check_plan`."""
    held = [at for slot in plan.slots for group in slot for at in group.documents]
    assert sorted(held) == list(range(len(plan.problem.lengths)))
    for slot in plan.slots:
        assert [rank for group in slot for rank in group.ranks] == list(range(plan.problem.ranks))
        for group in slot:
            assert sum(plan.problem.lengths[at] for at in group.documents) <= group.degree * plan.problem.capacity
            nodes = {rank // plan.problem.per_node for rank in group.ranks}
            assert len(nodes) == 1 or group.degree > plan.problem.per_node
    assert plan.seconds >= lower_bound(plan.problem) * (1 - 1e-9)


def check_all(one):
    seconds = {}
    for entry in ALGORITHMS:
        plan = plan_batch(entry, one)
        runs(plan)
        assert plan.digest == plan_batch(entry, replace(one)).digest
        seconds[entry.name] = plan.seconds
    assert seconds["balanced"] <= min(seconds["static"], seconds["homogeneous"]) * (1 + 1e-9)


@laws
@given(random_problems())
def test_every_algorithm_plans_what_can_run(one):
    check_all(one)


@pytest.mark.slow
@more
@given(random_problems())
def test_every_algorithm_plans_what_can_run_in_many_cases(one):
    check_all(one)


GAPS = {"sft": 0.05, "web": 0.05, "code": 0.07, "books": 0.15}
CPU_SECONDS = 0.5
ROOM = 5
"""Times as long as on a quiet core."""


def test_the_mixes_are_those_with_a_largest_gap():
    assert list(GAPS) == list(MIXES)


@pytest.mark.parametrize("name", GAPS)
def test_balanced_is_near_the_bound_and_quick(name):
    one = mix(name)
    assert len(one.lengths) == 512
    assert one.ranks == 64
    began = time.process_time()
    plan = plan_batch(ALGORITHMS.get("balanced"), one)
    assert time.process_time() - began < ROOM * CPU_SECONDS
    assert plan.gap <= GAPS[name]
    for baseline in ("static", "homogeneous"):
        assert plan.seconds <= plan_batch(ALGORITHMS.get(baseline), one).seconds


def every_plan(one):
    """Every way to divide documents among groups and slots, without regard to places."""

    def divided(left):
        if not left:
            yield []
            return
        first, *rest = left
        for size in range(len(rest) + 1):
            for others in itertools.combinations(rest, size):
                remaining = [at for at in rest if at not in others]
                for further in divided(remaining):
                    yield [(first, *others), *further]

    for groups in divided(range(len(one.lengths))):
        for degrees in itertools.product(one.degrees, repeat=len(groups)):
            shares = [Share(*both) for both in zip(degrees, groups, strict=True)]
            if any(sum(one.lengths[at] for at in each.documents) > each.degree * one.capacity for each in shares):
                continue
            for slots in itertools.product(range(len(groups)), repeat=len(groups)):
                found = [[share for share, at in zip(shares, slots, strict=True) if at == slot] for slot in set(slots)]
                if all(sum(share.degree for share in slot) <= one.ranks for slot in found):
                    yield placed("every", one, found)


TINY = [
    ([90, 60, 30], 2, False),
    ([90, 60, 30], 2, True),
    ([150, 20, 20, 20], 2, True),
    ([199, 150, 5], 2, False),
    ([70, 70, 70, 70], 2, True),
    ([250, 100, 100, 40], 3, True),
    ([100, 100, 90, 10], 3, False),
]


@pytest.mark.parametrize(("lengths", "ranks", "lockstep"), slow_unless([TINY[0], TINY[2]], TINY))
def test_no_plan_at_all_is_below_the_bound(lengths, ranks, lockstep):
    one = problem(lengths, ranks, lockstep=lockstep)
    best = min(plan.seconds for plan in every_plan(one))
    assert best >= lower_bound(one)
    for entry in ALGORITHMS:
        assert plan_batch(entry, one).seconds >= best * (1 - 1e-9)
    assert plan_batch(ALGORITHMS.get("balanced"), one).seconds <= 1.05 * best


def test_a_broken_plan_is_noticed():
    one = problem([90, 60, 30, 120], ranks=4, per_node=2, multiple=1)
    good = plan_batch(ALGORITHMS.get("balanced"), one)
    pads = tuple(RankGroup(rank, 1, ()) for rank in range(4))

    def fault(*slots, **changes):
        with pytest.raises(AssertionError) as caught:
            check_plan(BatchPlan(algorithm="broken", problem=replace(one, **changes), slots=slots))
        return str(caught.value)

    pairs = (RankGroup(0, 2, (0, 3)),)
    assert "every document once" in fault(pads)
    assert "every document once" in fault(*good.slots, *good.slots)
    assert "cover every rank once" in fault((*pairs, RankGroup(1, 1, (1,)), RankGroup(2, 1, (2,)), RankGroup(3, 1, ())))
    assert "cover every rank once" in fault((RankGroup(0, 2, (0, 1)), RankGroup(2, 2, (2, 3)), RankGroup(4, 4, ())))
    assert "do not fit" in fault((RankGroup(0, 2, (0, 1, 3)), RankGroup(2, 1, (2,)), RankGroup(3, 1, ())))
    wide = (RankGroup(0, 1, (0,)), RankGroup(1, 2, (1, 3)), RankGroup(3, 1, (2,)))
    assert "end of a node" in fault(wide)
    assert "may be formed" in fault(
        (RankGroup(0, 3, (0, 1, 3)), RankGroup(3, 1, (2,))), rates=one.rates[:2], per_node=4
    )
    assert "multiple" in fault(*good.slots, multiple=len(good.slots) + 1)
    assert "1 slots hold no documents" in fault(*good.slots, pads)


def test_a_time_below_the_bound_is_noticed(monkeypatch):
    one = problem([90, 60])
    monkeypatch.setattr(plan_module, "step_seconds", lambda problem, slots: 0.5 * lower_bound(problem))
    with pytest.raises(AssertionError, match="below the bound"):
        plan_batch(ALGORITHMS.get("static"), one)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lengths": ()}, "needs documents"),
        ({"lengths": (5, 0)}, "document 1 has 0 tokens; leave out"),
        ({"lengths": (5, -3)}, "document 1 has -3 tokens; leave out"),
        ({"lengths": (5, 401)}, "document 1 of 401 tokens is longer .* 4 ranks of 100 tokens; raise"),
        ({"ranks": 0}, "ranks must be at least 1, got 0"),
        ({"capacity": 0}, "capacity must be at least 1, got 0"),
        ({"per_node": 0}, "per node must be at least 1"),
        ({"stages": 0}, "stages must be at least 1"),
        ({"multiple": 0}, "multiple must be at least 1"),
        ({"rates": ()}, "degrees of groups must lie between 1 and the 4 ranks"),
        ({"ranks": 2}, r"between 1 and the 2 ranks, got \[1, 2, 3, 4\]"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(changes, said):
    with pytest.raises(Refused, match=said) as caught:
        replace(problem([5]), **changes)
    assert "\n" not in str(caught.value)


@algorithms
def test_digests_tell_plans_apart(name):
    entry = ALGORITHMS.get(name)
    one = problem([90, 60, 30])
    same, other = plan_batch(entry, one), plan_batch(entry, problem([90, 60, 31]))
    assert same.digest == plan_batch(entry, problem([90, 60, 30])).digest
    # two calibration files: equal slots, other rates
    rate = replace(one, rates=tuple((degree, each._replace(fixed=1.5)) for degree, each in one.rates))
    assert len({same.digest, other.digest, plan_batch(entry, rate).digest}) == 3


@algorithms
def test_documents_of_one_length_fill_equal_groups(name):
    plan = plan_batch(ALGORITHMS.get(name), problem([100] * 8, ranks=4, exchange=0.0))
    assert plan.degrees == {1: 8}
    assert len(plan.slots) == 2
    assert plan.gap == pytest.approx(0)


@pytest.mark.parametrize("name", ["flexsp", "dcp", "balanced"])
def test_unequal_degrees_share_a_slot(name):
    plan = plan_batch(ALGORITHMS.get(name), problem([150, 100, 100], degrees=[1, 2, 4], exchange=0.05))
    assert plan.degrees == {1: 2, 2: 1}
    assert len(plan.slots) == 1
    assert plan.group_of(0, 1) == RankGroup(0, 2, (0,))


def test_balanced_forms_groups_of_any_size():
    plan = plan_batch(ALGORITHMS.get("balanced"), problem([300, 100], exchange=0.05))
    assert plan.degrees == {1: 1, 3: 1}
