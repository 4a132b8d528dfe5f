"""Parts of the planners: times, places, buckets, bin packing, and documents that wait."""

import itertools
import random
from dataclasses import replace

import pytest

from megatron_cp.batches import ALGORITHMS
from megatron_cp.batches.buckets import boundaries, rounded
from megatron_cp.batches.place import place
from megatron_cp.batches.plan import Share, placed
from megatron_cp.batches.steps import plan_batch
from megatron_cp.batches.subsets import shortest
from megatron_cp.batches.timing import least_slots
from megatron_cp.batches.wlb import delayed
from tests.batches.problems import problem


def test_a_pipeline_of_equal_slots_takes_a_slot_for_each_stage_more():
    one = problem([100] * 12, ranks=2, stages=3)
    slots = [[Share(1, (at,)), Share(1, (at + 1,))] for at in range(0, 12, 2)]
    seconds = one.alone(100, 1)
    assert placed("equal", one, slots).seconds == pytest.approx((6 + 3 - 1) * seconds)


def test_a_long_slot_paces_every_stage():
    one = problem([100, 20, 20, 20], ranks=1, stages=4)
    slots = [[Share(1, (at,))] for at in range(4)]
    plan, alone = placed("one", one, slots), placed("one", replace(one, stages=1), slots)
    assert plan.seconds > alone.seconds + 3 * one.alone(20, 1)


def test_replicas_that_share_no_group_do_not_wait_for_each_other():
    slots = [[Share(1, (0,)), Share(1, (1,))], [Share(1, (2,)), Share(1, (3,))]]
    for stages in (1, 2):
        one = problem([100, 20, 20, 100], ranks=2, stages=stages)
        apart, together = (placed("two", replace(one, lockstep=lockstep), slots).seconds for lockstep in (False, True))
        assert apart < together
        # a slot without documents is left out
        assert placed("two", one, [*slots, [Share(2, ())]]).seconds == placed("two", one, slots).seconds


def test_a_group_waits_for_its_last_rank():
    one = problem([100, 40, 150], ranks=2)
    plan = placed("wait", one, [[Share(1, (0,)), Share(1, (1,))], [Share(2, (2,))]])
    assert plan.spans[1][0].start == one.alone(100, 1)
    assert plan.seconds == one.alone(100, 1) + one.alone(150, 2)


def test_groups_that_are_full_but_for_a_few_tokens_are_found():
    one = problem([138, 112, 108, 101, 98], ranks=6)
    (found,) = shortest(one)
    assert sorted(found) == [Share(2, (3, 4)), Share(4, (0, 1, 2))]
    # six documents of 100 tokens leave no rank for another
    assert sorted(len(slot) for slot in shortest(problem([100] * 6 + [1], ranks=6))) == [1, 6]
    # groups of two lie inside a node
    assert shortest(problem([150] * 3, ranks=6, degrees=[1, 2], per_node=3)) is None


def test_slots_are_shortest_together_with_those_that_fill_up_a_multiple():
    for multiple, slots in ((1, 2), (2, 2), (3, 3)):
        one = problem([100, 100, 100, 5], ranks=2, multiple=multiple, lockstep=True)
        found = shortest(one)
        assert len(placed("shortest", one, found).slots) == slots
        assert sorted(at for slot in found for share in slot for at in share.documents) == [0, 1, 2, 3]


@pytest.mark.parametrize("per_node", [1, 2, 3, 4, 8])
def test_groups_have_places_of_their_own_inside_nodes(per_node):
    numbers = random.Random(per_node)
    placed_any = 0
    for _ in range(200):
        degrees = [numbers.randint(1, 9) for _ in range(numbers.randint(1, 6))]
        first = place(degrees, 16, per_node)
        if first is None:
            continue
        placed_any += 1
        ranks = [rank for start, degree in zip(first, degrees, strict=True) for rank in range(start, start + degree)]
        assert len(ranks) == len(set(ranks))
        assert max(ranks) < 16
        for start, degree in zip(first, degrees, strict=True):
            assert degree > per_node or start // per_node == (start + degree - 1) // per_node
            assert degree <= per_node or start % per_node == 0
    assert placed_any


def test_powers_of_two_have_a_place_wherever_ranks_are_free():
    numbers = random.Random(0)
    for _ in range(200):
        left, degrees = 24, []
        while left:
            degrees.append(numbers.choice([size for size in (1, 2, 4, 8, 16) if size <= left]))
            left -= degrees[-1]
        assert place(degrees, 24, 8) is not None


@pytest.mark.parametrize("buckets", [1, 2, 3, 4, 20])
def test_buckets_pad_least(buckets):
    numbers = random.Random(buckets)
    for _ in range(30):
        lengths = [numbers.randint(1, 30) for _ in range(numbers.randint(1, 9))]
        upper = boundaries(lengths, buckets)
        assert upper == sorted(set(upper))
        assert len(upper) <= buckets
        padded = rounded(lengths, upper)
        assert all(boundary >= length for boundary, length in zip(padded, lengths, strict=True))
        distinct = sorted(set(lengths))
        least = min(
            sum(rounded(lengths, sorted({*chosen, distinct[-1]}))) - sum(lengths)
            for size in range(min(buckets, len(distinct)))
            for chosen in itertools.combinations(distinct, size)
        )
        assert sum(padded) - sum(lengths) == least


def test_memory_asks_for_no_more_slots_than_bin_packing():
    numbers = random.Random(0)
    above_the_sum = 0
    for _ in range(60):
        lengths = [numbers.randint(1, 20) for _ in range(numbers.randint(1, 6))]
        bins = next(
            count
            for count in range(1, 7)
            if any(
                all(
                    sum(length for length, at in zip(lengths, chosen, strict=True) if at == slot) <= 20
                    for slot in chosen
                )
                for chosen in itertools.product(range(count), repeat=len(lengths))
            )
        )
        found = least_slots(problem(lengths, ranks=2, capacity=10))
        assert -(-sum(lengths) // 20) <= found <= bins
        above_the_sum += found > -(-sum(lengths) // 20)
    assert above_the_sum


def test_documents_wait_until_every_microbatch_gets_one():
    # two microbatches of 100 tokens in each step; from 25 and from 50 tokens a document waits for a second one
    assert delayed([60, 20, 30, 70, 40], [[0, 1, 2], [3, 4]], 100) == [[1], [2, 4, 0, 3]]


def test_documents_that_wait_after_the_last_step_are_run_in_it():
    assert delayed([60, 20, 30], [[0, 1, 2]], 100) == [[1, 2, 0]]


def test_short_documents_never_wait():
    batches = [[0, 1], [2, 3]]
    assert delayed([5, 6, 7, 8], batches, 100) == batches


def test_slots_are_a_multiple_of_what_the_schedule_asks():
    plan = plan_batch(
        ALGORITHMS.get("balanced"), problem([100] * 5, ranks=1, stages=2, schedule="interleaved", multiple=2)
    )
    assert len(plan.slots) == 6
