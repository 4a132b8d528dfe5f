"""Where all ranks wait for each other while a step is played: the LM head over all of them (arXiv:2411.05288)."""

from collections import defaultdict
from math import inf

from megatron_cp.pipeline.action import BACKWARD, FORWARD, HEAD, LOGITS, LOGITS_BACK, Cell, flat
from megatron_cp.pipeline.costs import MeetingTimes
from megatron_cp.pipeline.schedule import Schedule

Point = tuple[str, int | None]


class Meetings:
    """Meetings of all ranks: S waits for the last stage's F, T and that stage's backward for the S or T of all."""

    def __init__(self, schedule: Schedule, times: MeetingTimes) -> None:
        self._placement, self._barriers, self._times = schedule.placement, schedule.barriers, times
        self._last = len(schedule.placement.rank_of) - 1
        self._ends: dict[Point, dict[int, float]] = defaultdict(dict)
        self._asleep: dict[Point, list[int]] = defaultdict(list)

    def start(self, cell: Cell, clock: float, rank: int) -> float:
        """Return when `cell` can start as far as the others are concerned; infinity, and `rank` sleeps, if not yet."""
        for stage, kind, micro in flat([cell]):
            if kind == LOGITS:
                clock = max(clock, self._met((FORWARD, micro), 1, rank, self._times.share))
            elif kind == LOGITS_BACK:
                clock = max(clock, self._met((LOGITS, micro), self._placement.ranks, rank, self._times.logits))
            elif kind in BACKWARD and stage == self._last:
                point = (LOGITS if self._barriers == 1 else LOGITS_BACK, micro)
                clock = max(clock, self._met(point, self._placement.ranks, rank, self._times.gradient))
        return clock

    def _met(self, point: Point, ranks: int, rank: int, time: float) -> float:
        ends = self._ends[point]
        if len(ends) < ranks:
            self._asleep[point].append(rank)
            return inf
        # a sum takes its time on every rank, the output of the last stage is there already
        return max(ends.values()) + (0.0 if rank in ends and ranks == 1 else time)

    def ran(self, cell: Cell, rank: int, clock: float) -> list[int]:
        """Note the end of `cell`; return the ranks that it wakes."""
        woken: list[int] = []
        for stage, kind, micro in flat([cell]):
            if kind in HEAD or (kind == FORWARD and stage == self._last):
                self._ends[kind, micro][rank] = clock
                ranks = 1 if kind == FORWARD else self._placement.ranks
                if len(self._ends[kind, micro]) == ranks:
                    woken += self._asleep.pop((kind, micro), [])
        return woken
