"""List scheduling of one step: every rank's forwards and backwards have a fixed order, how they mix is decided in time.

All ranks advance together. A free rank takes a forward or an input gradient that has arrived, and fills the time until
the next arrival with weight gradients. Nothing here knows a placement's name: orders, times and caps are per stage and
rank.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import chain
from math import inf
from typing import NamedTuple

from megatron_cp.pipeline.action import FORWARD, INPUT, WEIGHT, Action, Cell, flat
from megatron_cp.pipeline.costs import Costs
from megatron_cp.pipeline.placement import Placement
from megatron_cp.pipeline.simulate import durations, hops

EPSILON = 1e-9


class Order(NamedTuple):
    """The order of one rank's forwards and of its backwards, each as (stage, microbatch)."""

    forwards: Sequence[tuple[int, int]]
    backwards: Sequence[tuple[int, int]]

    @property
    def needed(self) -> int:
        """Forwards that must run before the first backward can."""
        return self.forwards.index(self.backwards[0]) + 1


class Knobs(NamedTuple):
    """What the list scheduler leaves open.

    limit: per rank, chunks forwarded and not yet returned, up to which a forward goes before a backward
    spare: how many more a rank that has nothing else to do may forward
    lag:   per rank, input gradients that may wait for their W
    share: part of a W that must fit before the next arrival for the W to start
    """

    limit: Sequence[float]
    spare: int
    lag: Sequence[float]
    share: float


@dataclass
class _Lane:
    """One rank while it is scheduled.

    latest: when its next action must have started for all of its work to end below the bar
    """

    order: Order
    cap: float
    limit: float
    lag: float
    latest: float
    forwards: int = 0
    backwards: int = 0
    free: float = 0.0
    used: float = 0.0
    freeable: float = 0.0
    waiting: deque[tuple[int, int]] = field(default_factory=deque)
    actions: list[Action] = field(default_factory=list)


def weave(
    placement: Placement, costs: Costs, caps: Sequence[float], orders: Sequence[Order], knobs: Knobs, bar: float = inf
) -> tuple[tuple[Action, ...], ...] | None:
    """The table of one step under `knobs`, or None when caps and orders block each other or the makespan reaches `bar`.

    caps: per rank, in M_B
    """
    return _Weaver(placement, costs, caps, orders, knobs, bar).run()


class _Weaver:
    """All ranks of a step while it is scheduled, with the arrivals known so far."""

    def __init__(
        self,
        placement: Placement,
        costs: Costs,
        caps: Sequence[float],
        orders: Sequence[Order],
        knobs: Knobs,
        bar: float,
    ) -> None:
        micros = len(orders[0].forwards) // placement.chunks
        stages = len(placement.rank_of)
        latest = [bar - micros * work for work in costs.work(placement)]
        self._rank_of, self._last = placement.rank_of, stages - 1
        self._duration, self._hop = durations(costs), hops(placement, costs)
        self._kept, self._held = costs.kept, costs.held
        self._spare, self._share = knobs.spare, knobs.share
        self._forward_at = [[inf] * micros for _ in range(stages)]
        self._backward_at = [[inf] * micros for _ in range(stages)]
        self._forward_at[0] = [0.0] * micros
        self._lanes = [
            _Lane(order, cap * costs.unit + EPSILON * costs.unit, limit, lag, late)
            for order, cap, limit, lag, late in zip(orders, caps, knobs.limit, knobs.lag, latest, strict=True)
        ]
        self._awake = [(0.0, rank) for rank in range(placement.ranks)]
        heapify(self._awake)

    def run(self) -> tuple[tuple[Action, ...], ...] | None:
        lanes = self._lanes
        while self._awake:
            now, rank = heappop(self._awake)
            lane = lanes[rank]
            if now < lane.free:
                continue
            kind, until = self._choose(lane, now)
            if kind:
                if now >= lane.latest:
                    return None
                self._start(rank, lane, kind, now)
            elif until < inf:
                heappush(self._awake, (until, rank))
        if any(len(lane.actions) < 3 * len(lane.order.forwards) for lane in lanes):
            return None
        return tuple(tuple(lane.actions) for lane in lanes)

    def _choose(self, lane: _Lane, now: float) -> tuple[str | None, float]:
        """What a free rank does now, and when the next thing it waits for arrives."""
        back, ahead, starved = self._arrivals(lane)
        kind = self._ready(lane, now, back, ahead)
        if kind == FORWARD and starved:
            return WEIGHT, now
        if lane.waiting and kind and len(lane.waiting) > lane.lag and lane.actions[-1].kind == INPUT:
            return WEIGHT, now
        until = min(back if back > now else inf, ahead if ahead > now else inf)
        if kind is None and lane.waiting:
            took = self._duration[WEIGHT][lane.waiting[0][0]]
            if now + took * self._share <= until + EPSILON * took:
                return WEIGHT, now
        return kind, until

    def _arrivals(self, lane: _Lane) -> tuple[float, float, bool]:
        """When the next backward and the next forward arrive, and whether the forward needs a W to make room."""
        forwards, backwards = lane.forwards, lane.backwards
        back = inf
        if backwards < len(lane.order.backwards):
            stage, micro = lane.order.backwards[backwards]
            back = self._backward_at[stage][micro]
        if forwards == len(lane.order.forwards) or forwards - backwards >= lane.limit + self._spare:
            return back, inf, False
        stage, micro = lane.order.forwards[forwards]
        room = lane.cap - lane.used - self._kept[stage]
        if room + lane.freeable < 0:
            return back, inf, False
        return back, self._forward_at[stage][micro], room < 0

    def _ready(self, lane: _Lane, now: float, back: float, ahead: float) -> str | None:
        """Below the limit a forward goes first; above it one runs only where no backward comes meanwhile."""
        below = lane.forwards - lane.backwards < lane.limit
        if ahead <= now and (below or back > now):
            stage, _ = lane.order.forwards[lane.forwards]
            return FORWARD if below or back == inf or back > now + self._duration[FORWARD][stage] else None
        return INPUT if back <= now else None

    def _start(self, rank: int, lane: _Lane, kind: str, now: float) -> None:
        stage, micro = self._take(lane, kind)
        took = self._duration[kind][stage]
        lane.free = end = now + took
        lane.latest += took
        lane.actions.append(Action(stage, kind, micro))
        heappush(self._awake, (end, rank))
        if kind == FORWARD:
            self._send_forward(stage, micro, end)
        elif kind == INPUT:
            self._send_back(stage, micro, end)

    def _take(self, lane: _Lane, kind: str) -> tuple[int, int]:
        """Take the next cell of `kind` off its order and account for its memory."""
        if kind == WEIGHT:
            cell = lane.waiting.popleft()
            lane.used -= self._held[cell[0]]
            lane.freeable -= self._held[cell[0]]
        elif kind == FORWARD:
            cell = lane.order.forwards[lane.forwards]
            lane.forwards += 1
            lane.used += self._kept[cell[0]]
        else:
            cell = lane.order.backwards[lane.backwards]
            lane.backwards += 1
            lane.used -= self._kept[cell[0]] - self._held[cell[0]]
            lane.freeable += self._held[cell[0]]
            lane.waiting.append(cell)
        return cell

    def _send_forward(self, stage: int, micro: int, end: float) -> None:
        if stage == self._last:
            self._backward_at[stage][micro] = end
        else:
            self._forward_at[stage + 1][micro] = arrival = end + self._hop[0][stage]
            self._wake(self._rank_of[stage + 1], arrival)

    def _send_back(self, stage: int, micro: int, end: float) -> None:
        if stage:
            self._backward_at[stage - 1][micro] = arrival = end + self._hop[1][stage]
            self._wake(self._rank_of[stage - 1], arrival)

    def _wake(self, rank: int, arrival: float) -> None:
        if self._lanes[rank].free <= arrival:
            heappush(self._awake, (arrival, rank))


def orders_of(table: Sequence[Sequence[Cell]]) -> list[Order]:
    """The orders that a table's forwards and backwards follow."""
    return [
        Order(
            [(stage, micro or 0) for stage, kind, micro in flat(cells) if kind == FORWARD],
            [(stage, micro or 0) for stage, kind, micro in flat(cells) if kind not in (FORWARD, WEIGHT)],
        )
        for cells in table
    ]


def grouped(placement: Placement, m: int, group: int) -> list[Order]:
    """Groups of `group` microbatches through a rank's chunks, backwards through them in reverse."""
    groups = [range(start, min(start + group, m)) for start in range(0, m, group)]
    return [
        Order(
            list(chain.from_iterable([(stage, micro) for micro in micros] for micros in groups for stage in stages)),
            list(
                chain.from_iterable(
                    [(stage, micro) for micro in micros] for micros in groups for stage in reversed(stages)
                )
            ),
        )
        for stages in placement.of_rank
    ]
