"""Moves of activations while a step is played: when they start and end, and what is kept at every moment."""

from collections.abc import Iterator, Sequence
from math import inf
from typing import NamedTuple

from megatron_cp.pipeline.action import BACKWARD, EVICT, FORWARD, INPUT, LOAD, MOVES, WEIGHT, Action, halves
from megatron_cp.pipeline.costs import Costs
from megatron_cp.pipeline.schedule import PEER, Schedule

StageMicro = tuple[int, int | None]


class Links:
    """One rank's links for moves: one to the host, used one way at a time, or one each way to its peer.

    A move starts once the rank has run what stands before it and its link is free, and runs beside what follows. A
    forward waits until everything that was moved away before it is gone, for it needs the room; a backward waits for
    its activations.
    """

    def __init__(self, to: str | None, costs: Costs) -> None:
        self._costs = costs
        self._both_ways = to == PEER
        self._free = {EVICT: 0.0, LOAD: 0.0}
        self._gone = 0.0
        self._ended: dict[StageMicro, float] = {}

    def move(self, action: Action, clock: float) -> tuple[float, float]:
        """Return the start and the end of a move whose rank has come to it at `clock`."""
        chunk = (action.stage, action.micro)
        start = max(clock, self._free[action.kind], self._ended.get(chunk, 0.0))
        end = start + self._costs.moving(action)
        for kind in (action.kind,) if self._both_ways else MOVES:
            self._free[kind] = end
        self._ended[chunk] = end
        if action.kind == EVICT:
            self._gone = max(self._gone, end)
        return start, end

    def ready(self, action: Action) -> float:
        """Return when the moves that `action` waits for are over."""
        if action.kind == FORWARD:
            return self._gone
        return self._ended.get((action.stage, action.micro), 0.0) if action.kind in BACKWARD else 0.0


class _Change(NamedTuple):
    """A change of the memory of a rank; of several at one time those that free come first."""

    time: float
    size: float


def peaks_over_time(
    schedule: Schedule, costs: Costs, starts: Sequence[Sequence[float]], ends: Sequence[Sequence[float]]
) -> tuple[float, ...]:
    """Return the most memory of each rank at once, in M_B, where a rank keeps what moves until the move is over."""
    changes: list[list[_Change]] = [[] for _ in schedule.table]
    for rank, cells in enumerate(schedule.table):
        peer = changes[-1 - rank] if schedule.to == PEER else []
        for cell, start, end in zip(cells, starts[rank], ends[rank], strict=True):
            for action in halves(cell):
                if action.kind in MOVES:
                    size, _ = costs.kept_by(action)
                    away = action.kind == EVICT
                    changes[rank].append(_Change(end, -size) if away else _Change(start, size))
                    peer.append(_Change(start, size) if away else _Change(end, -size))
                else:
                    changes[rank] += _of_compute(action, costs, start, end)
    return tuple(_highest(sorted(each)) / costs.unit for each in changes)


def _of_compute(action: Action, costs: Costs, start: float, end: float) -> Iterator[_Change]:
    kept, held = costs.kept_by(action)
    if action.kind == FORWARD:
        yield _Change(start, kept)
    elif action.kind == WEIGHT:
        yield _Change(end, -held)
    else:
        yield _Change(end, held - kept if action.kind == INPUT else -kept)


def _highest(changes: Sequence[_Change]) -> float:
    alive, most = 0.0, -inf
    for _, size in changes:
        alive += size
        most = max(most, alive)
    return most
