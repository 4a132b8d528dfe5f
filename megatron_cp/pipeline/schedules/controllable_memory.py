"""Pipelines with controllable memory (arXiv:2405.15362): V-Half, V-Min and 1F1B-V, two chunks on the V.

1. Building block: one microbatch's passes take fixed slots on each rank.
2. Repeat: the block recurs every six slots, so the peak is the sum of its lifespans over six.
3. Reorder and squeeze: the ramps, where slots are free, are pulled together without raising the peak.
4. Weight gradients fill the slots that stay free.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from megatron_cp.pipeline.action import FULL, INPUT, Action
from megatron_cp.pipeline.placement import vee
from megatron_cp.pipeline.schedules.building_blocks import (
    Board,
    PassKind,
    PlacedPass,
    fill_weights,
    filled_peak,
    squeeze,
)

PERIOD = 6
Block = Sequence[tuple[int, int, int, int]]


def v_half(p: int, m: int, v: int = 2) -> list[list[Action]]:
    """Half of 1F1B's memory: peak 2 floor((p + 2) / 2) chunks; idle about 3p chunk times for equal times."""
    gap = 0 if p % 2 else 3
    return _split(p, m, [(2 * r, 3 * p - r - 2, 3 * p + gap + 2 * r - 1, 6 * p + gap - r - 2) for r in range(p)])


def v_min(p: int, m: int, v: int = 2) -> list[list[Action]]:
    """A third of 1F1B's memory: peak 2 floor((p + 4) / 3) chunks; idle about 4p chunk times for equal times."""
    gap = 0 if p % 3 else 2
    return _split(p, m, [(r, 2 * p - r - 1, 2 * p + gap + r, 4 * p + gap - r - 1) for r in range(p)])


def one_forward_one_backward_v(p: int, m: int, v: int = 2) -> list[list[Action]]:
    """About two thirds of 1F1B's memory with whole backwards, which take two slots."""
    board = Board(p, _repeat(_fused_block(p), m), backward=2)
    peak = board.peak()
    for event in board.events():
        board.pull(event, partial(board.fits, peak=peak))
    return _actions(p, board.events(), FULL)


def _fused_block(p: int) -> Block:
    """Return forwards down and up the V, then backwards, with a pause of three slots behind every third of them."""
    backwards = []
    now = 2 * p + (0 if p % 3 else 3)
    for number in range(2 * p):
        backwards.append(now)
        now += 2 if (number - p - 1) % 3 else 5
    return [(r, 2 * p - 1 - r, backwards[r], backwards[2 * p - 1 - r]) for r in range(p)]


def _repeat(block: Block, m: int) -> list[PlacedPass]:
    return [
        PlacedPass(slot + PERIOD * micro, rank, order, micro)
        for rank, slots in enumerate(block)
        for order, slot in enumerate(slots)
        for micro in range(m)
    ]


def _split(p: int, m: int, block: Block) -> list[list[Action]]:
    """Pull both ramps together with the W's in place, then the last one again with the W's taken out."""
    # step 2
    events = _repeat(block, m)
    # step 3, the first and the last ramp
    board = Board(p, [*events, *fill_weights(events)])
    peak = board.peak()
    for event in _ramps(board.events(), m, first=True):
        board.pull(event, partial(board.fits, peak=peak))

    # step 3 again for the last ramp, where the W's may move out of the way
    board = Board(p, _without_weights(squeeze(p, board.events())))
    peak = max(filled_peak(board.line(rank)) for rank in range(p))
    for event in _ramps(board.events(), m, first=False):
        board.pull(event, partial(board.fits_filled, peak=peak))

    # step 4
    events = _without_weights(squeeze(p, [*board.events(), *fill_weights(board.events())]))
    return _actions(p, sorted([*events, *fill_weights(events)]), INPUT)


def _ramps(events: Iterable[PlacedPass], m: int, first: bool) -> Iterator[PlacedPass]:
    """Yield passes before rank 0's first whole round trip (only with `first`) and after the last microbatch's entry."""
    returned = entered = False
    for event in events:
        returned |= event.rank == 0 and event.order == PassKind.BACKWARD_OF_FIRST
        if entered if returned else first:
            yield event
        entered |= event.order == PassKind.FORWARD_OF_FIRST and event.micro == m - 1


def _without_weights(events: Iterable[PlacedPass]) -> list[PlacedPass]:
    return [event for event in events if event.order != PassKind.WEIGHT]


def _actions(p: int, events: Iterable[PlacedPass], backward: str) -> list[list[Action]]:
    """Return the actions of the passes; a W belongs to the oldest waiting backward, the second chunk's first."""
    stages = vee(p).of_rank
    actions: list[list[Action]] = [[] for _ in range(p)]
    waiting: list[tuple[list[Action], list[Action]]] = [([], []) for _ in range(p)]
    for event in events:
        first, second = waiting[event.rank]
        if event.order == PassKind.WEIGHT:
            actions[event.rank].append((second or first).pop(0)._replace(kind="W"))
            continue
        chunk = 1 if event.order in (PassKind.FORWARD_OF_SECOND, PassKind.BACKWARD_OF_SECOND) else 0
        kind = "F" if event.order <= PassKind.FORWARD_OF_SECOND else backward
        actions[event.rank].append(Action(stages[event.rank][chunk], kind, event.micro))
        if kind == INPUT:
            (second if chunk else first).append(actions[event.rank][-1])
    return actions
