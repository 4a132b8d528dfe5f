"""Receives moved up: on CUDA a send occupies the sender until the receiver has posted, so a late receive delays it.

For example on the second of four ranks, `1f1b` (other receives left out):

    written             B0  SEND_B0  F3  SEND_F3  RECV_B1  B1
    posted     RECV_B1  B0  SEND_B0  F3  SEND_F3           B1      the gradient travels during B0 and F3
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

from megatron_cp.pipeline.action import FORWARD, INPUT, RECV_B, RECV_F, Action, Cell, first_half, halves
from megatron_cp.pipeline.schedule import Schedule

RECEIVES = (RECV_F, RECV_B)


class _Post(NamedTuple):
    """One receive and the index, among the rank's other actions, of the one before which it is posted.

    queued:  True if an earlier message of its channel is still to come then, which this one waits behind
    written: its index in the table that it comes from
    """

    place: int
    queued: bool
    written: int
    receive: Action


def receive_early(schedule: Schedule) -> Schedule:
    """Return the lowered schedule with every receive before the action that uses the previous one of its channel.

    A channel is one rank's activations or gradients for another; its receives keep their order. So the next message
    travels while the last one is worked on. A posted receive holds a buffer, and on CUDA a few multiprocessors, so it
    moves up no further than behind this rank's own share of the same microbatch.

    This adds no deadlock, even where a process launches everything through one queue (CUDA_DEVICE_MAX_CONNECTIONS = 1):
    no receive moves down, and one that moves up starts at once or stands directly before an action that needs the
    message it waits behind.
    """
    return replace(schedule, table=tuple(tuple(_moved(schedule, rank)) for rank in range(len(schedule.table))))


def _moved(schedule: Schedule, rank: int) -> Iterator[Cell]:
    rest = [cell for cell in schedule.table[rank] if not _is_receive(cell)]
    due: dict[int, list[_Post]] = defaultdict(list)
    for post in _posts(schedule, rank, rest):
        due[post.place].append(post)
    for place in range(len(rest) + 1):
        # one that waits for an earlier message would hold up the others
        yield from (post.receive for post in sorted(due[place], key=lambda post: (post.queued, post.written)))
        yield from rest[place : place + 1]


def _is_receive(cell: Cell) -> bool:
    return isinstance(cell, Action) and cell.kind in RECEIVES


def _posts(schedule: Schedule, rank: int, rest: list[Cell]) -> Iterator[_Post]:
    """When to post each of the rank's receives."""
    places = {first_half(action): place for place, cell in enumerate(rest) for action in halves(cell)}
    as_written = list(accumulate((not _is_receive(cell) for cell in schedule.table[rank]), initial=0))
    for receives in _channels(schedule, rank).values():
        # what is used in a later step arrives in this one
        uses = [places.get(_use(receive), len(rest)) for _, receive in receives]
        # a later message may be used first
        deadlines = list(accumulate(reversed(uses), min))[::-1]
        place, last_use = 0, -1
        for (written, receive), use, deadline in zip(receives, uses, deadlines, strict=True):
            useful = 1 + max((places.get(cause, -1) for cause in _causes(schedule, rank, receive)), default=-1)
            place = min(max(place, last_use, useful), deadline, as_written[written])
            yield _Post(place, last_use >= place, written, receive)
            last_use = max(last_use, use)


def _channels(schedule: Schedule, rank: int) -> dict[tuple[int, str], list[tuple[int, Action]]]:
    """This rank's receives, by sender and kind, in their order and each with its index in the table."""
    found: dict[tuple[int, str], list[tuple[int, Action]]] = defaultdict(list)
    for place, cell in enumerate(schedule.table[rank]):
        if isinstance(cell, Action) and cell.kind in RECEIVES:
            source = cell.stage + (1 if cell.kind == RECV_B else -1)
            found[schedule.placement.rank_of[source], cell.kind].append((place, cell))
    return found


def _use(receive: Action) -> Action:
    return Action(receive.stage, FORWARD if receive.kind == RECV_F else INPUT, receive.micro)


def _causes(schedule: Schedule, rank: int, receive: Action) -> Iterator[Action]:
    """This rank's own forwards and backwards of the microbatch without which the message cannot exist."""
    for stage in schedule.placement.of_rank[rank]:
        if receive.kind == RECV_B or stage < receive.stage:
            yield Action(stage, FORWARD, receive.micro)
        if receive.kind == RECV_B and stage > receive.stage:
            yield Action(stage, INPUT, receive.micro)
