"""Every schedule's first step runs under NCCL's rules for messages, as fast as if transfers had no rules at all."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from megatron_cp.pipeline import SCHEDULES
from megatron_cp.pipeline.action import COMPUTE
from megatron_cp.pipeline.build import build
from megatron_cp.pipeline.channels import communicators
from megatron_cp.pipeline.costs import uniform
from megatron_cp.pipeline.execute import forward_only, lower
from megatron_cp.pipeline.passes import merge
from megatron_cp.pipeline.placement import Placement, loop, vee
from megatron_cp.pipeline.profile import lower_split
from megatron_cp.pipeline.receive_early import RECEIVES
from megatron_cp.pipeline.schedule import Schedule
from megatron_cp.pipeline.simulate import simulate
from tests.cases import slow_unless
from tests.nccl import ALL_RULES, DeadlockError, Message, MismatchError, Operation, Rules, Tally, play
from tests.pipeline.launches import launches, numbers, receive_of
from tests.pipeline.played import FIXED, scheduled

RULES = pytest.mark.parametrize("rules", ALL_RULES, ids=str)


def lowered(schedule: Schedule) -> Iterator[Schedule]:
    """The table of a step, of a measured step, and of an evaluation."""
    yield lower(schedule)
    yield lower_split(schedule)
    yield forward_only(schedule.placement, schedule.micros)


def assert_runs(schedule: Schedule, tally: Tally) -> None:
    # a step whose backwards are all in two halves is measured as it is
    for table in dict.fromkeys(lowered(schedule)):
        tally.play(launches(table))


@pytest.mark.parametrize("p", [2, 3, 4])
@pytest.mark.parametrize("name", FIXED)
def test_no_schedule_deadlocks(name: str, p: int, tally: Tally) -> None:
    assert_runs(scheduled(name, p, 3 * p), tally)


@pytest.mark.parametrize("p", slow_unless([2], [2, 3, 4]))
def test_no_searched_schedule_deadlocks(p: int, tally: Tally) -> None:
    for v in (1, 2):
        assert_runs(build("auto", p, 2 * p, v, costs=uniform(loop(p, v), (1.0, 1.2, 0.8, 0.1))), tally)


def several_chunks(p: int) -> list[tuple[int, int]]:
    """Chunks per rank and microbatches: those of each kind, not each with each."""
    return [(1, p + 1), (1, 2 * p), (2, p), (2, p + 1), (2, 3 * p), (3, p), (3, 2 * p)]


@pytest.mark.slow
@pytest.mark.parametrize("p", range(2, 9))
@pytest.mark.parametrize("name", FIXED)
def test_no_schedule_deadlocks_at_any_size(name: str, p: int, tally: Tally) -> None:
    chunks = SCHEDULES.get(name).chunks
    played = 0
    for v, m in [(chunks, m) for m in (p, p + 1, 2 * p, 3 * p)] if chunks else several_chunks(p):
        try:
            schedule = build(name, p, m, v)
        except ValueError:
            continue
        assert_runs(schedule, tally)
        played += 1
    assert played >= 2


@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("name", FIXED)
def test_transfers_cost_no_more_than_their_time(name: str, p: int) -> None:
    """The simulator lets a message leave when it is made; on the streams of a GPU it leaves no later."""
    schedule = merge(scheduled(name, p, 3 * p))
    costs = uniform(schedule.placement, (1.0, 1.2, 0.8, 0.1))
    for eager in (False, True):
        seconds = play(launches(lower(schedule), costs), Rules(eager, one_queue=False), costs.comm)
        assert seconds == pytest.approx(simulate(schedule, costs).makespan, rel=1e-12)


@pytest.mark.parametrize("placement", [loop(2), loop(3), loop(4, 2), loop(5, 3), vee(2), vee(5)], ids=str)
def test_a_rank_has_one_channel_per_communicator(placement: Placement) -> None:
    for channels in communicators(placement):
        ranks = [rank for _, *ends in channels for rank in ends]
        assert len(set(ranks)) == len(ranks)
    hops = sum(here != there for here, there in zip(placement.rank_of, placement.rank_of[1:], strict=False))
    assert sum(map(len, communicators(placement))) <= 2 * hops


# what goes wrong without the rules that the executor keeps


def shared(placement: Placement) -> dict:
    """One communicator for all activations in one direction, and one for gradients."""
    return {channel: (channel.kind, channel.source < channel.target) for channel in numbers(placement)}


def test_a_communicator_with_two_channels_per_rank_deadlocks() -> None:
    table = lower(scheduled("1f1b", 4, 8))
    operations = launches(table, number_of=shared(table.placement))
    play(operations, Rules(eager=False, one_queue=False))
    with pytest.raises(DeadlockError, match="rank 0 waits for the end of 0RECV_B"):
        play(operations, Rules(eager=True, one_queue=False))


@RULES
@pytest.mark.parametrize("name", FIXED)
def test_ranks_that_have_not_met_hang_at_their_first_messages(name: str, rules: Rules) -> None:
    with pytest.raises(DeadlockError, match=r"rank 0 waits for the launch of \dRECV_\w\d; rank 1 waits for the launch"):
        play(launches(lower(scheduled(name, 2, 4)), meet=False), rules)


def swapped(schedule: Schedule, rank: int, first: str, second: str) -> Schedule:
    """The table with these two actions of a rank in each other's place."""
    names = {first: second, second: first}
    actions = {str(action): action for action in schedule.table[rank]}
    changed = tuple(actions[names.get(name, name)] for name in map(str, schedule.table[rank]))
    return replace(schedule, table=(*schedule.table[:rank], changed, *schedule.table[rank + 1 :]))


def test_swapped_sends_are_caught() -> None:
    table = lower(scheduled("gpipe", 2, 4))
    with pytest.raises(MismatchError, match="message 2"):
        play(launches(swapped(table, 0, "0SEND_F1", "0SEND_F2")), ALL_RULES[0])


def posted_at_use(schedule: Schedule) -> Schedule:
    """The table with every receive directly before the action that uses its message."""
    moved = []
    for actions in schedule.table:
        rest = [action for action in actions if action.kind not in RECEIVES]
        table = [(receive_of(action), action) if action.kind in COMPUTE else (None, action) for action in rest]
        moved.append(tuple(part for receive, action in table for part in (receive, action) if part in actions))
    return replace(schedule, table=tuple(moved))


def test_receives_that_are_posted_at_their_use_deadlock_in_one_queue() -> None:
    late = launches(posted_at_use(lower(scheduled("breadth-first", 2, 6))))
    play(late, Rules(eager=False, one_queue=False))
    with pytest.raises(DeadlockError, match=r"0 waits for the end of 0SEND_F\d; rank 1 waits for the end of 1SEND_F"):
        play(late, Rules(eager=False, one_queue=True))


# the model itself, rule by rule


def message(name: str, source: int, target: int, communicator: str = "one") -> Operation:
    return Operation(name, (Message(communicator, source, target, name),))


MET = [[message("met", 0, 1), message("back", 1, 0)], [message("met", 0, 1), message("back", 1, 0)]]


@RULES
def test_a_send_waits_for_its_receive(rules: Rules) -> None:
    there, back = message("there", 0, 1), message("return", 1, 0)
    assert play([[*MET[0], there, back], [*MET[1], there, back]], rules, hop=1.0) == 4.0
    with pytest.raises(DeadlockError):
        play([[*MET[0], there, back], [*MET[1], back, there]], rules)


@RULES
def test_a_group_starts_and_ends_together(rules: Rules) -> None:
    both = [message("there", 0, 1).messages[0], message("return", 1, 0).messages[0]]
    ranks = [[*MET[0], Operation("group", tuple(both))], [*MET[1], Operation("group", tuple(both[::-1]))]]
    assert play(ranks, rules, hop=1.0) == 3.0


def test_compute_waits_only_for_what_it_names() -> None:
    slow, quick = Operation("slow", seconds=5.0), Operation("quick", seconds=1.0)
    receiver = [message("there", 0, 1), quick, Operation("user", after=(0,), seconds=1.0)]
    assert play([[slow, message("there", 0, 1)], receiver], ALL_RULES[0], hop=0.5) == 6.5


def test_one_queue_holds_up_what_was_launched_later() -> None:
    first, second = message("first", 0, 1), message("second", 0, 1)
    meet = message("met", 0, 1, "two")
    sender = [meet, first, second, message("needed", 0, 1, "two")]
    receiver = [meet, message("needed", 0, 1, "two"), Operation("user", after=(1,)), first, second]
    play([sender, receiver], Rules(eager=False, one_queue=False))
    with pytest.raises(DeadlockError, match="rank 0 waits for the end of first; rank 1 waits for the end of needed"):
        play([sender, receiver], Rules(eager=False, one_queue=True))
