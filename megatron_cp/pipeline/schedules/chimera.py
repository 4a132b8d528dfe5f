"""Chimera (arXiv:2107.06925): two pipes through the same ranks, one down and one up, each with half the microbatches.

Every rank holds a part of both copies of the model. Four ranks with 4 microbatches and T_F = T_B:

    rank 0   F0 F1    F2 B2 F3 B3 B0 B1      0 and 1 go down and start here; 2 and 3 come up and turn round here
    rank 1      F0 F2 F1 F3 B2 B0 B3 B1
    rank 2      F2 F0 F3 F1 B0 B2 B1 B3
    rank 3   F2 F3    F0 B0 F1 B1 B2 B3

Each pipe fills in where the other one waits.
"""

from collections import Counter
from collections.abc import Iterator
from math import inf
from typing import NamedTuple

from megatron_cp.errors import Refused
from megatron_cp.pipeline.action import FORWARD, FULL, INPUT, WEIGHT, Action
from megatron_cp.pipeline.placement import two_way
from megatron_cp.pipeline.schedule import Schedule


def chimera(p: int, m: int, v: int = 1, backward: int = 2, flight: int | None = None) -> list[list[Action]]:
    """Return the order for whole backwards. Idle 2(p - 2) T_F for T_B = 2 T_F and m = p, more with more microbatches.

    backward: T_B in T_F; for 1 the idle time is p - 2 with any m
    flight:   most microbatches of a stage between F and B, p / 2 or more; by default p / 2 + 1
    """
    most = p // 2 + 1 if flight is None else flight
    return _Play(p, m, {FORWARD: 1, FULL: backward}, most, inf).orders()


def chimera_zb(p: int, m: int, v: int = 1) -> list[list[Action]]:
    """Split the backwards: I first, then F; W fills what is left. Peak p + 1.

    Idle (p / 2 - 1) T_F for equal times with m = p or m >= 2p, but for p = 16 and m = 32 two units more.
    """
    return _Play(p, m, {FORWARD: 1, INPUT: 1, WEIGHT: 1}, p // 2, p + 1).orders()


def shared_out(p: int, m: int) -> Schedule:
    """Return the empty table of two pipes; raises ValueError for an odd p or m."""
    where = two_way(p)
    if m % 2:
        raise Refused(f"half of the microbatches go down the ranks and half go up, got m = {m}; take {m + 1}")
    return Schedule("two pipes", where, m, ())


class _Choice(NamedTuple):
    """A pass that a free rank can take; the smallest goes first.

    turn: backwards before forwards before W's
    left: stages that the microbatch still has before it in this direction; for a W, its number
    """

    turn: int
    left: int
    action: Action


class _Play:
    """A step played in whole units of time, in which a free rank takes the microbatch that has come furthest.

    times:  of the kinds of passes
    flight: most microbatches of a stage between F and B or I; fewer near the end of a pipe
    kept:   most microbatches of a rank, of both pipes, between F and B or W
    """

    def __init__(self, p: int, m: int, times: dict[str, int], flight: int, kept: float) -> None:
        self._table, self._times = shared_out(p, m), times
        self._flight, self._kept = flight, kept
        self._backward, self._frees = (INPUT, WEIGHT) if WEIGHT in times else (FULL, FULL)
        self._ends: dict[Action, int] = {}
        self._begun: Counter[tuple[int, str]] = Counter()

    def orders(self) -> list[list[Action]]:
        """Return the passes of every rank in order."""
        where = self._table.placement
        orders: list[list[Action]] = [[] for _ in range(where.ranks)]
        free, now = [0] * where.ranks, 0
        while any(len(order) < self._table.micros * len(self._times) for order in orders):
            for rank, order in enumerate(orders):
                if free[rank] <= now and (choices := list(self._choices(where.of_rank[rank], now))):
                    action = min(choices).action
                    order.append(action)
                    self._begun[action.stage, action.kind] += 1
                    free[rank] = self._ends[action] = now + self._times[action.kind]
            now += 1
        return orders

    def _choices(self, stages: tuple[int, ...], now: int) -> Iterator[_Choice]:
        where, begun, back = self._table.placement, self._begun, self._backward
        kept = sum(begun[stage, FORWARD] - begun[stage, self._frees] for stage in stages)
        for stage in stages:
            depth, to_end = stage % where.length, where.length - 1 - stage % where.length
            # 1. a backward whose gradient is there
            action = self._next(stage, back)
            cause = Action(stage, FORWARD, action.micro) if where.last(stage) else action._replace(stage=stage + 1)
            if self._ends.get(cause, inf) <= now:
                yield _Choice(0, depth, action)
            # 2. a forward whose input is there
            action = self._next(stage, FORWARD)
            room = begun[stage, FORWARD] - begun[stage, back] < min(to_end + 1, self._flight) and kept < self._kept
            there = where.first(stage) or self._ends.get(action._replace(stage=stage - 1), inf) <= now
            if room and there and action.micro in self._table.micros_of(stage):
                yield _Choice(1, to_end, action)
            # 3. the oldest W of the stage
            if begun[stage, WEIGHT] < begun[stage, INPUT]:
                yield _Choice(2, begun[stage, WEIGHT], self._next(stage, WEIGHT))

    def _next(self, stage: int, kind: str) -> Action:
        return Action(stage, kind, self._table.micros_of(stage).start + self._begun[stage, kind])
