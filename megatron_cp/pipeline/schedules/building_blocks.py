"""Building blocks of arXiv:2405.15362: passes of two chunks on the V in slots of unit time.

A microbatch's passes on rank 0 of 2, in the block of V-Min (f, b of the first chunk, F, B of the second):

    slot     0  1  2  3  4  5  6  7
    rank 0   f        F  B        b
    rank 1      f  F        B  b

The block of the next microbatch is the same, six slots later; W's go where slots are free.
"""

from collections.abc import Callable, Iterable, Iterator
from enum import IntEnum
from itertools import accumulate
from typing import NamedTuple


class PassKind(IntEnum):
    """The passes of one microbatch on one rank, in the order in which they run; W's last."""

    FORWARD_OF_FIRST = 0
    FORWARD_OF_SECOND = 1
    BACKWARD_OF_SECOND = 2
    BACKWARD_OF_FIRST = 3
    WEIGHT = 4


FORWARDS = (PassKind.FORWARD_OF_FIRST, PassKind.FORWARD_OF_SECOND)
BACKWARDS = (PassKind.BACKWARD_OF_SECOND, PassKind.BACKWARD_OF_FIRST)


class PlacedPass(NamedTuple):
    """A pass of one microbatch in its slot. Events sort by time; a W's `micro` counts the W's of its rank."""

    slot: int
    rank: int
    order: int
    micro: int


class Board:
    """The passes in their slots, and the number of chunks alive after each slot.

    backward: slots of a backward; 2 means it holds its weight gradient and frees memory in its second slot
    """

    def __init__(self, p: int, events: Iterable[PlacedPass], backward: int = 1) -> None:
        self._last_rank = p - 1
        self._backward = backward
        self._slots: list[dict[tuple[int, int], int]] = [{} for _ in range(p)]
        self._taken: list[set[int]] = [set() for _ in range(p)]
        for event in events:
            self.put(event)
        self._alive = [self._count_alive(slots) for slots in self._slots]
        self._backwards = [sorted(slot for slot, order in self.line(rank) if order in BACKWARDS) for rank in range(p)]

    def events(self) -> list[PlacedPass]:
        """Return all passes in order of time."""
        return sorted(
            PlacedPass(slot, rank, *key) for rank, slots in enumerate(self._slots) for key, slot in slots.items()
        )

    def peak(self) -> int:
        """Return the most chunks alive on any rank."""
        return max(map(max, self._alive))

    def line(self, rank: int, moved: PlacedPass | None = None, slot: int = 0) -> list[tuple[int, int]]:
        """Return (slot, pass) of one rank in order of time, as if `moved` were in `slot`."""
        changed = moved and (moved.order, moved.micro)
        return sorted((slot if key == changed else at, key[0]) for key, at in self._slots[rank].items())

    def pull(self, event: PlacedPass, allowed: Callable[[PlacedPass, int], bool]) -> None:
        """Move `event` to the first earlier slot that is free, after its predecessors, and allowed."""
        for slot in range(self.earliest(event), event.slot):
            if self._free(event, slot) and allowed(event, slot):
                self._move(event, slot)
                return

    def put(self, event: PlacedPass) -> None:
        """Put `event` in its slot."""
        slot, rank, order, micro = event
        self._slots[rank][order, micro] = slot
        self._taken[rank] |= {slot, slot + (self._backward if order in BACKWARDS else 1) - 1}

    def fits(self, event: PlacedPass, slot: int, peak: int) -> bool:
        """Return True if moving `event` up to `slot` keeps its rank's memory at `peak`."""
        return event.order not in FORWARDS or max(self._alive[event.rank][slot : event.slot]) < peak

    def fits_filled(self, event: PlacedPass, slot: int, peak: int) -> bool:
        """Return True if it keeps the memory at `peak` on a board without W's, where they take every free slot."""
        return filled_peak(self.line(event.rank, event, slot)) <= peak

    def earliest(self, event: PlacedPass) -> int:
        """Return the first slot after everything `event` waits for."""
        _, rank, order, micro = event
        # 1. the pass of the microbatch before
        ends = [self._end(rank, order, micro - 1)] if micro else [0]
        if order == PassKind.WEIGHT:
            return max(ends[0], self._backwards[rank][micro] + 1 if self._backwards[rank] else 0)
        # 2. the pass of the stage before: down the ranks or up, by the side of the V
        before = rank - 1 if order in (PassKind.FORWARD_OF_FIRST, PassKind.BACKWARD_OF_SECOND) else rank + 1
        if 0 <= before <= self._last_rank:
            ends.append(self._end(before, order, micro))
        # 3. the microbatch's own pass before on this rank
        if order:
            ends.append(self._end(rank, order - 1, micro))
        return max(ends)

    def _end(self, rank: int, order: int, micro: int) -> int:
        return self._slots[rank][order, micro] + (self._backward if order in BACKWARDS else 1)

    def _free(self, event: PlacedPass, slot: int) -> bool:
        wanted = {slot, slot + (self._backward if event.order in BACKWARDS else 1) - 1}
        return not wanted & self._taken[event.rank] and max(wanted) < event.slot

    def _move(self, event: PlacedPass, slot: int) -> None:
        old, rank, order, _ = event
        self._taken[rank] -= {old, old + (self._backward if order in BACKWARDS else 1) - 1}
        self.put(event._replace(slot=slot))
        self._live(rank, order, slot, old)
        if order in BACKWARDS:
            self._backwards[rank] = sorted(slot if at == old else at for at in self._backwards[rank])

    def _live(self, rank: int, order: int, start: int, stop: int) -> None:
        """Account for a pass that has moved from `stop` to `start`."""
        change, shift = self._effect(order)
        for slot in range(start + shift, stop + shift) if change else ():
            self._alive[rank][slot] += change

    def _effect(self, order: int) -> tuple[int, int]:
        """Return by how much a pass changes the chunks alive, and in which of its slots."""
        if order in FORWARDS:
            return 1, 0
        if order == PassKind.WEIGHT:
            return -1, 0
        return (-1, 1) if self._backward == 2 else (0, 0)

    def _count_alive(self, slots: dict[tuple[int, int], int]) -> list[int]:
        changes = [0] * (max(slots.values(), default=0) + 3)
        for (order, _), slot in slots.items():
            change, shift = self._effect(order)
            changes[slot + shift] += change
        return list(accumulate(changes))


def squeeze(p: int, events: Iterable[PlacedPass]) -> list[PlacedPass]:
    """Keep the order on every rank, and put each pass as early as its predecessors allow."""
    board = Board(p, ())
    ends = [0] * p
    for event in sorted(events):
        free = event.order == PassKind.WEIGHT and event.micro == 0
        slot = max(ends[event.rank], 0 if free else board.earliest(event))
        board.put(event._replace(slot=slot))
        ends[event.rank] = slot + 1
    return board.events()


def fill_weights(events: Iterable[PlacedPass]) -> Iterator[PlacedPass]:
    """Yield one W for every backward, each in the first free slot of its rank behind it."""
    lines: dict[int, list[PlacedPass]] = {}
    for event in sorted(events):
        lines.setdefault(event.rank, []).append(event)
    for rank, line in lines.items():
        taken = {event.slot: event.order for event in line}
        waiting = done = 0
        slot = line[0].slot
        while waiting or slot <= line[-1].slot:
            if slot in taken:
                waiting += taken[slot] in BACKWARDS
            elif waiting:
                yield PlacedPass(slot, rank, PassKind.WEIGHT, done)
                done, waiting = done + 1, waiting - 1
            slot += 1


def filled_peak(line: Iterable[tuple[int, int]]) -> int:
    """Return the peak in chunks of one rank whose W's take every free slot they can."""
    alive = peak = waiting = 0
    before = -1
    for slot, order in line:
        freed = min(waiting, slot - before - 1)
        alive, waiting = alive - freed, waiting - freed
        if order in FORWARDS:
            alive += 1
            peak = max(peak, alive)
        else:
            waiting += 1
        before = slot
    return peak
