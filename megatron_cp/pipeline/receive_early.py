"""Receives moved up: on CUDA a send occupies the sender until the receiver has posted, so a late receive delays it."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate

from megatron_cp.pipeline.action import FORWARD, INPUT, RECV_B, RECV_F, Action, first_half
from megatron_cp.pipeline.schedule import Schedule

RECEIVES = (RECV_F, RECV_B)


def receive_early(schedule: Schedule) -> Schedule:
    """The same lowered schedule with every receive before the action that uses the previous one of its channel.

    A channel is one rank's activations or gradients for another; its receives keep their order. So the next message
    travels while the last one is worked on, and no more than these two have a buffer. None is posted before this rank
    has done its own share of what is to come, for a posted receive holds a buffer, and on CUDA a few multiprocessors.
    Only a compute action waits for a message, so moving receives adds no deadlock to a schedule that has none.
    """
    return replace(schedule, table=tuple(tuple(_moved(schedule, rank)) for rank in range(len(schedule.table))))


def _moved(schedule: Schedule, rank: int) -> Iterator[Action]:
    rest = [action for action in schedule.table[rank] if action.kind not in RECEIVES]
    places = {first_half(action): place for place, action in enumerate(rest)}
    due: dict[int, list[Action]] = defaultdict(list)
    for receives in _channels(schedule, rank):
        for place, receive in zip(_posts(schedule, rank, receives, places), receives, strict=True):
            due[place].append(receive)
    for place, action in enumerate(rest):
        yield from due[place]
        yield action


def _channels(schedule: Schedule, rank: int) -> Iterator[list[Action]]:
    """This rank's receives of every other rank's activations and of its gradients, each in their order."""
    found: dict[tuple[int, str], list[Action]] = defaultdict(list)
    for action in schedule.table[rank]:
        if action.kind in RECEIVES:
            source = action.stage + (1 if action.kind == RECV_B else -1)
            found[schedule.placement.rank_of[source], action.kind].append(action)
    yield from found.values()


def _posts(schedule: Schedule, rank: int, receives: list[Action], places: dict[Action, int]) -> list[int]:
    """The index among the rank's other actions before which each of a channel's receives is posted."""
    uses = [places[_use(receive)] for receive in receives]
    useful = [
        1 + max((places[cause] for cause in _causes(schedule, rank, receive)), default=-1) for receive in receives
    ]
    # a later message may be used first
    deadlines = list(accumulate(reversed(uses), min))[::-1]
    posts: list[int] = []
    for number, deadline in enumerate(deadlines):
        before = max(posts[-1], uses[number - 1]) if number else 0
        posts.append(min(deadline, max(before, useful[number])))
    return posts


def _use(receive: Action) -> Action:
    return Action(receive.stage, FORWARD if receive.kind == RECV_F else INPUT, receive.micro)


def _causes(schedule: Schedule, rank: int, receive: Action) -> Iterator[Action]:
    """This rank's own forwards and backwards of the microbatch without which the message cannot exist."""
    for stage in schedule.placement.of_rank[rank]:
        if receive.kind == RECV_B or stage < receive.stage:
            yield Action(stage, FORWARD, receive.micro)
        if receive.kind == RECV_B and stage > receive.stage:
            yield Action(stage, INPUT, receive.micro)
