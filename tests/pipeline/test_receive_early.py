"""Receives moved up: no rank waits for another in a circle, channels keep their order, and buffers stay few."""

from collections import Counter, defaultdict, deque
from dataclasses import replace
from itertools import pairwise

import pytest

from megatron_cp.pipeline import SCHEDULES
from megatron_cp.pipeline.action import BACKWARD, COMPUTE, FORWARD, RECV_B, RECV_F, SEND_B, SEND_F, Action
from megatron_cp.pipeline.execute import forward_only, lower
from megatron_cp.pipeline.passes import add_transfers
from megatron_cp.pipeline.placement import loop, vee
from megatron_cp.pipeline.receive_early import RECEIVES, receive_early
from megatron_cp.pipeline.schedule import Schedule
from tests.pipeline.played import FIXED, scheduled

SENT = {RECV_F: SEND_F, RECV_B: SEND_B}


def channel(schedule: Schedule, rank: int, action: Action) -> tuple[int, int, str]:
    """Source, target and kind of the tensor that a send or a receive of `rank` is about."""
    before, sends = action.kind in (RECV_F, SEND_B), action.kind in SENT.values()
    other = schedule.placement.rank_of[action.stage + (-1 if before else 1)]
    kind = action.kind.removeprefix("SEND").removeprefix("RECV")
    return (rank, other, kind) if sends else (other, rank, kind)


def play(schedule: Schedule) -> dict[tuple[int, int, str], int]:
    """Run all ranks as an executor does; the most messages of each channel that were posted and not yet used.

    A send is over at once and queues; a receive takes the next message of its channel, whichever that is; a compute
    action waits for what it uses. Fails where all ranks wait, or where a message is not the one that was meant.
    """
    places = [0] * len(schedule.table)
    queues: dict[tuple[int, int, str], deque[Action]] = defaultdict(deque)
    posted: dict[tuple[int, int, str], deque[Action]] = defaultdict(deque)
    arrived: set[tuple[int, Action]] = set()
    waiting: Counter[tuple[int, int, str]] = Counter()
    most: Counter[tuple[int, int, str]] = Counter()
    while any(place < len(actions) for place, actions in zip(places, schedule.table, strict=True)):
        moved = False
        for rank, actions in enumerate(schedule.table):
            while places[rank] < len(actions):
                action = actions[places[rank]]
                receive = uses(schedule, rank, action)
                if receive and (rank, receive) not in arrived:
                    break
                if receive:
                    waiting[channel(schedule, rank, receive)] -= 1
                if action.kind in RECEIVES:
                    way = channel(schedule, rank, action)
                    posted[way].append(action)
                    waiting[way] += 1
                    most[way] = max(most[way], waiting[way])
                elif action.kind in SENT.values():
                    queues[channel(schedule, rank, action)].append(action)
                places[rank] += 1
                moved = True
        for way, messages in queues.items():
            while messages and posted[way]:
                sent, meant = messages.popleft(), posted[way].popleft()
                step = 1 if sent.kind == SEND_F else -1
                assert (sent.stage + step, sent.kind, sent.micro) == (meant.stage, SENT[meant.kind], meant.micro)
                arrived.add((way[1], meant))
                moved = True
        assert moved, [str(actions[place]) for place, actions in zip(places, schedule.table, strict=True)]
    assert not any(queues.values())
    return most


def uses(schedule: Schedule, rank: int, action: Action) -> Action | None:
    """The receive that a compute action waits for."""
    receive = action._replace(kind=RECV_F if action.kind == FORWARD else RECV_B)
    computes = action.kind == FORWARD or action.kind in BACKWARD
    return receive if computes and receive in schedule.table[rank] else None


def sizes(name: str, p: int) -> list[int]:
    """Numbers of microbatches: fewer than ranks where the rule has a table for it, and more."""
    if SCHEDULES.get(name).chunks is None:
        return [p, 2 * p]
    return [2 * p, 2 * p + 1] if name == "dualpipe-v" else [1, p, 2 * p + 1]


@pytest.mark.parametrize("p", range(2, 9))
@pytest.mark.parametrize("name", FIXED)
def test_every_schedule_runs_with_early_receives(name: str, p: int) -> None:
    for m in sizes(name, p):
        assert_few_buffers(lower(scheduled(name, p, m)))


@pytest.mark.parametrize("placement", [loop(4), loop(3, 2), vee(4), vee(5)], ids=str)
@pytest.mark.parametrize("m", [1, 3, 8])
def test_evaluation_runs_with_early_receives(placement, m: int) -> None:
    assert_few_buffers(forward_only(placement, m))


def assert_few_buffers(lowered: Schedule) -> None:
    """Two messages of a channel at a time, or as many as where every receive stands as `add_transfers` wrote it."""
    computes = tuple(tuple(action for action in actions if action.kind in COMPUTE) for actions in lowered.table)
    written = play(add_transfers(replace(lowered, table=computes)))
    for way, most in play(lowered).items():
        assert most <= max(2, written[way])


@pytest.mark.parametrize("name", ["1f1b", "izb", "zb-v"])
def test_only_receives_move_and_the_next_is_posted_before_the_last_is_used(name: str) -> None:
    plain = add_transfers(scheduled(name, 4, 8))
    for rank, (before, after) in enumerate(zip(plain.table, receive_early(plain).table, strict=True)):
        assert others(before) == others(after)
        for way in {channel(plain, rank, action) for action in before if action.kind in RECEIVES}:
            receives = [action for action in after if action.kind in RECEIVES and channel(plain, rank, action) == way]
            assert receives == [action for action in before if action in receives]
            for last, action in pairwise(receives):
                posted = after.index(action)
                # or else right behind what the message cannot exist without
                assert posted < after.index(user(after, last)) or others(after[:posted])[-1].micro == action.micro


def others(actions: tuple[Action, ...]) -> list[Action]:
    return [action for action in actions if action.kind not in RECEIVES]


def user(actions: tuple[Action, ...], receive: Action) -> Action:
    """The action that uses what this receive brings."""
    kinds = (FORWARD,) if receive.kind == RECV_F else tuple(BACKWARD)
    cell = (receive.stage, receive.micro)
    return next(action for action in actions if action.kind in kinds and (action.stage, action.micro) == cell)
