"""What each rank's executor launches for a lowered schedule, as operations of the model of NCCL in `tests.nccl`."""

from collections import Counter
from collections.abc import Iterator

from megatron_cp.pipeline.action import (
    BACKWARD,
    COMPUTE,
    EVICT,
    FORWARD,
    FULL,
    GIVE,
    HEAD,
    HOLD,
    LENDERS,
    LOAD,
    LOGITS,
    LOGITS_BACK,
    RECV_B,
    RECV_F,
    REDUCE,
    SEND_F,
    SHARE,
    SHARE_E,
    SUM_E,
    SUM_S,
    SUM_T,
    SUMS,
    WEIGHT,
    Action,
    Overlap,
    halves,
)
from megatron_cp.pipeline.channels import PipelineChannel, communicators, lending_channel
from megatron_cp.pipeline.costs import Costs, uniform
from megatron_cp.pipeline.placement import Placement
from megatron_cp.pipeline.receive_early import RECEIVES
from megatron_cp.pipeline.schedule import PEER, Schedule
from megatron_cp.pipeline.simulate import durations
from tests.nccl import Message, Operation
from tests.pipeline.played import UNIT

Numbers = dict[PipelineChannel, int]
Said = dict[tuple[int, int | None], tuple[str, ...]]


def numbers(placement: Placement, lends: bool = False) -> Numbers:
    """The communicator of every channel, as the executor has it."""
    return {channel: number for number, channels in enumerate(communicators(placement, lends)) for channel in channels}


def launches(
    schedule: Schedule,
    costs: Costs | None = None,
    number_of: Numbers | None = None,
    meet: bool = True,
    first: bool = True,
) -> list[list[Operation]]:
    """The first step of every rank, or a later one; times are 1 where no costs are given."""
    costs = costs or uniform(schedule.placement, UNIT)
    number_of = number_of or numbers(schedule.placement, schedule.to == PEER)
    ranks = [list(meeting(number_of, rank)) if meet else [] for rank in range(len(schedule.table))]
    for rank, operations in enumerate(ranks):
        operations += sums_meeting(schedule, rank) if meet else []
    for rank, operations in enumerate(ranks):
        operations += _step(schedule, rank, costs, number_of, len(operations), sizes_said(schedule) if first else {})
    return ranks


def meeting(number_of: Numbers, rank: int) -> Iterator[Operation]:
    """What `Channels.meet` launches."""
    for channel, number in number_of.items():
        if rank in (channel.source, channel.target):
            yield Operation(f"meeting {channel}", (Message(number, channel.source, channel.target, "meeting"),))


def sums_meeting(schedule: Schedule, rank: int) -> Iterator[Operation]:
    """The first launch of each communicator of all ranks that the LM head over them uses."""
    used = {cell.kind for cells in schedule.table for cell in cells if isinstance(cell, Action)} & SUMS
    for kind in sorted(used):
        yield among_all(f"meeting {kind}", kind, len(schedule.table), rank, "meeting")


def among_all(name: str, kind: str, p: int, rank: int, label: object) -> Operation:
    """A collective of all ranks: none ends before all have started it."""
    others = [other for other in range(p) if other != rank]
    ends = sorted([*((rank, other) for other in others), *((other, rank) for other in others)])
    return Operation(name, tuple(Message(kind, *pair, label) for pair in ends), group=tuple(range(p)))


def _step(
    schedule: Schedule, rank: int, costs: Costs, number_of: Numbers, place: int, said: Said
) -> Iterator[Operation]:
    """The actions in order, the first at `place`.

    A backward also waits until its forward's output has been sent, and until its activations are back; a forward, and
    whatever else makes room, until those that were moved away are gone; what a lender gives back, until it has come.
    Before a stage's first chunk that moves its sizes are sent, which the peer's host waits for.
    """
    took = durations(costs)
    received: dict[Action, int] = {}
    sent: dict[tuple[int, int | None], int] = {}
    leaving: list[int] = []
    back: dict[tuple[int, int | None], int] = {}
    lent: dict[tuple[int, int | None], int] = {}
    given: list[int] = []
    summed: dict[tuple[str, int | None], int] = {}
    returning: int | None = None
    last = len(schedule.placement.rank_of) - 1
    for cell in schedule.table[rank]:
        if isinstance(cell, Overlap) or cell.kind in COMPUTE:
            after = [received[brings] for action in halves(cell) if (brings := receive_of(action)) in received]
            backwards = {(action.stage, action.micro) for action in halves(cell) if action.kind in BACKWARD}
            after += [sent.pop(made) for made in backwards & sent.keys()]
            after += [back.pop(chunk) for chunk in backwards & back.keys()]
            if any(action.kind == FORWARD for action in halves(cell)):
                after += leaving
                leaving.clear()
            for stage, kind, micro in halves(cell):
                backward = kind in BACKWARD and stage == last
                needs = {LOGITS: SHARE, LOGITS_BACK: SUM_S}.get(kind)
                needs = (SUM_T if schedule.barriers == 2 else SUM_S) if backward else needs
                # the last rank has its own output
                if schedule.barriers and needs and not (needs == SHARE and schedule.placement.rank_of[last] == rank):
                    after.append(summed[needs, micro])
                if schedule.barriers and (stage, kind) == (0, FORWARD):
                    after.append(summed[SUM_E, micro])
            seconds = sum(took[action.kind][action.stage] for action in halves(cell)) - costs.saved(cell)
            yield Operation(str(cell), (), tuple(after), seconds)
        elif cell.kind in SUMS:
            if cell.kind == SHARE_E:
                if returning is not None:
                    yield Operation(f"gradients before {cell}", (), (returning,))
                    place += 1
                returning = place
            summed[cell.kind, cell.micro] = place
            yield among_all(str(cell), cell.kind, len(schedule.table), rank, cell.micro)
        elif cell.kind == REDUCE or (schedule.to != PEER and cell.kind in LENDERS):
            continue
        elif cell.kind in (EVICT, LOAD, HOLD, GIVE):
            chunk = (cell.stage, cell.micro)
            channel = lending_channel(schedule.placement, cell)
            label = (channel.kind, *chunk)
            ahead = said.get(chunk, ()) if cell.kind in (EVICT, HOLD) else ()
            for what in ahead:
                sizes = Message(number_of[channel], channel.source, channel.target, (what, *chunk))
                yield Operation(f"{what} of {cell}", (sizes,))
                # the owner's computation waits until they are sent, the peer's host until it can read them
                yield Operation(f"wait for the {what} of {cell}", (), (place,), blocks=cell.kind == HOLD)
                place += 2
            if said.get(chunk) == NOTHING:
                continue
            after = (lent.pop(chunk),) if cell.kind == GIVE else ()
            yield Operation(str(cell), (Message(number_of[channel], channel.source, channel.target, label),), after)
            if cell.kind == EVICT:
                leaving.append(place)
            elif cell.kind == LOAD:
                back[chunk] = place
            elif cell.kind == HOLD:
                lent[chunk] = place
            else:
                given.append(place)
        else:
            channel, label = _transfer(schedule.placement, cell)
            yield Operation(str(cell), (Message(number_of[channel], channel.source, channel.target, label),))
            if cell.kind in RECEIVES:
                received[cell] = place
            elif cell.kind == SEND_F:
                sent[cell.stage, cell.micro] = place
        place += 1
    yield Operation(
        "the end of the step", (), (*sent.values(), *leaving, *given, *(() if returning is None else (returning,)))
    )


NOTHING = ("count",)
"""All that is sent ahead of a chunk none of which moves."""


def sizes_said(schedule: Schedule) -> Said:
    """The messages ahead of the chunks that move in the first step, before both sides know the sizes of their stage."""
    said: Said = {}
    if schedule.to != PEER:
        return said
    for cells in schedule.table:
        forwards: Counter[int] = Counter()
        known: set[int] = set()
        for action in (action for cell in cells for action in halves(cell)):
            if action.kind == FORWARD:
                forwards[action.stage] += 1
            elif action.kind == EVICT and action.stage not in known:
                # what lasts beyond a microbatch shows in the second forward: nothing moves before it
                some = forwards[action.stage] > 1
                said[action.stage, action.micro] = ("count", "sizes") if some else NOTHING
                if some:
                    known.add(action.stage)
    return said


def receive_of(action: Action) -> Action | None:
    """The receive whose message this compute action uses, if that comes from another rank."""
    return (
        None if action.kind in (WEIGHT, *HEAD) else action._replace(kind=RECV_F if action.kind == FORWARD else RECV_B)
    )


def _transfer(placement: Placement, action: Action) -> tuple[PipelineChannel, tuple[str, int, int | None]]:
    """The channel of a send or a receive, and the tensor by the stage that made it."""
    kind = FORWARD if action.kind in (SEND_F, RECV_F) else FULL
    step = 1 if kind == FORWARD else -1
    maker = action.stage - step if action.kind in RECEIVES else action.stage
    rank_of = placement.rank_of
    return PipelineChannel(kind, rank_of[maker], rank_of[maker + step]), (kind, maker, action.micro)
