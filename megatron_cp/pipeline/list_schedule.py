"""List scheduling of one step: each rank's forwards and backwards have a fixed order; their mix follows from the times.

All ranks advance together, event by event. A free rank takes a forward or an input gradient that has arrived, and fills
the time until the next arrival with weight gradients:

    F0 F1 I0 F2 W0 I1      W0 fits between the end of F2 and the arrival of the gradient that I1 needs

Orders, times and caps are given per stage and rank, so that every placement is scheduled alike.
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
    """The parameters of the list scheduler.

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
class _RankState:
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


def list_schedule(
    placement: Placement, costs: Costs, caps: Sequence[float], orders: Sequence[Order], knobs: Knobs, bar: float = inf
) -> tuple[tuple[Action, ...], ...] | None:
    """Return the table of one step, or None if caps and orders block each other or the makespan reaches `bar`.

    caps: per rank, in M_B
    """
    return _ListScheduler(placement, costs, caps, orders, knobs, bar).run()


class _ListScheduler:
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
        self._ranks = [
            _RankState(order, cap * costs.unit + EPSILON * costs.unit, limit, lag, late)
            for order, cap, limit, lag, late in zip(orders, caps, knobs.limit, knobs.lag, latest, strict=True)
        ]
        self._awake = [(0.0, rank) for rank in range(placement.ranks)]
        heapify(self._awake)

    def run(self) -> tuple[tuple[Action, ...], ...] | None:
        ranks = self._ranks
        while self._awake:
            # 1. the earliest event: a rank becomes free, or a tensor that it may use arrives
            now, rank = heappop(self._awake)
            state = ranks[rank]
            if now < state.free:
                continue
            # 2. choose what the rank does now; without a choice it looks again at the next arrival
            kind, until = self._choose(state, now)
            if kind:
                # 3. give up as soon as the work left cannot end below the bar
                if now >= state.latest:
                    return None
                self._start(rank, state, kind, now)
            elif until < inf:
                heappush(self._awake, (until, rank))
        if any(len(state.actions) < 3 * len(state.order.forwards) for state in ranks):
            return None
        return tuple(tuple(state.actions) for state in ranks)

    def _choose(self, state: _RankState, now: float) -> tuple[str | None, float]:
        """Return what a free rank does now, and when the next tensor it waits for arrives."""
        back, ahead, starved = self._arrivals(state)
        kind = self._ready(state, now, back, ahead)
        # memory is short: only a W makes room for the forward
        if kind == FORWARD and starved:
            return WEIGHT, now
        # too many W's wait: one follows each I
        if state.waiting and kind and len(state.waiting) > state.lag and state.actions[-1].kind == INPUT:
            return WEIGHT, now
        # nothing is ready: fill the gap if enough of a W fits in it
        until = min(back if back > now else inf, ahead if ahead > now else inf)
        if kind is None and state.waiting:
            took = self._duration[WEIGHT][state.waiting[0][0]]
            if now + took * self._share <= until + EPSILON * took:
                return WEIGHT, now
        return kind, until

    def _arrivals(self, state: _RankState) -> tuple[float, float, bool]:
        """Return when the next backward and forward arrive, and True if the forward needs a W to make room."""
        forwards, backwards = state.forwards, state.backwards
        back = inf
        if backwards < len(state.order.backwards):
            stage, micro = state.order.backwards[backwards]
            back = self._backward_at[stage][micro]
        if forwards == len(state.order.forwards) or forwards - backwards >= state.limit + self._spare:
            return back, inf, False
        stage, micro = state.order.forwards[forwards]
        room = state.cap - state.used - self._kept[stage]
        if room + state.freeable < 0:
            return back, inf, False
        return back, self._forward_at[stage][micro], room < 0

    def _ready(self, state: _RankState, now: float, back: float, ahead: float) -> str | None:
        """Return the kind to run: below the limit a forward; above it a forward only if no backward comes meanwhile."""
        below = state.forwards - state.backwards < state.limit
        if ahead <= now and (below or back > now):
            stage, _ = state.order.forwards[state.forwards]
            return FORWARD if below or back == inf or back > now + self._duration[FORWARD][stage] else None
        return INPUT if back <= now else None

    def _start(self, rank: int, state: _RankState, kind: str, now: float) -> None:
        stage, micro = self._take(state, kind)
        took = self._duration[kind][stage]
        state.free = end = now + took
        state.latest += took
        state.actions.append(Action(stage, kind, micro))
        heappush(self._awake, (end, rank))
        if kind == FORWARD:
            self._send_forward(stage, micro, end)
        elif kind == INPUT:
            self._send_back(stage, micro, end)

    def _take(self, state: _RankState, kind: str) -> tuple[int, int]:
        """Take the next cell of `kind` off its order and account for its memory."""
        if kind == WEIGHT:
            cell = state.waiting.popleft()
            state.used -= self._held[cell[0]]
            state.freeable -= self._held[cell[0]]
        elif kind == FORWARD:
            cell = state.order.forwards[state.forwards]
            state.forwards += 1
            state.used += self._kept[cell[0]]
        else:
            cell = state.order.backwards[state.backwards]
            state.backwards += 1
            state.used -= self._kept[cell[0]] - self._held[cell[0]]
            state.freeable += self._held[cell[0]]
            state.waiting.append(cell)
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
        if self._ranks[rank].free <= arrival:
            heappush(self._awake, (arrival, rank))


def orders_of(table: Sequence[Sequence[Cell]]) -> list[Order]:
    """Return the orders of a table's forwards and of its backwards."""
    return [
        Order(
            [(stage, micro or 0) for stage, kind, micro in flat(cells) if kind == FORWARD],
            [(stage, micro or 0) for stage, kind, micro in flat(cells) if kind not in (FORWARD, WEIGHT)],
        )
        for cells in table
    ]


def grouped(placement: Placement, m: int, group: int) -> list[Order]:
    """Return orders in groups of `group` microbatches through a rank's chunks, backwards through them in reverse."""
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
