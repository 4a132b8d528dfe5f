"""Place S and T of a vocabulary over all ranks in a finished table (arXiv:2411.05288).

All ranks advance together, event by event, each through its own order. S runs as soon as the output of the last stage
is there. With two barriers T follows as soon as all ranks have run S, for the last stage's backward waits for it; with
one T fills a gap, or comes two cells behind the S after it. Backwards may come some forwards later than in the table:

    1f1b, rank 2 of 4                   F0 F1 B0 F2 B1 F3 B2 B3
    one forward later, one barrier      F0 F1 F2 S0 B0 F3 S1 T0 B1 S2 T1 B2 S3 T2 B3 T3

Each of these keeps a chunk of activations more, and gives the barriers more time.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from math import inf

from megatron_cp.errors import Refused
from megatron_cp.pipeline.action import BACKWARD, FORWARD, LOGITS, LOGITS_BACK, WEIGHT, Action
from megatron_cp.pipeline.costs import Costs, MeetingTimes, uniform
from megatron_cp.pipeline.placement import Placement
from megatron_cp.pipeline.schedule import Schedule, Table
from megatron_cp.pipeline.simulate import durations, hops
from megatron_cp.pipeline.vocabulary import with_head

WAITING = 2
"""Microbatches whose logits a rank keeps for T at once."""
LATE = 2
"""Other cells after which a T comes that found no gap."""
FEW = 3
"""Microbatches per rank with which tables are compared."""
CLOSE = 1.005
"""How much longer a step may take that keeps less than the shortest one."""
EVERYONE = -1
"""In the place of a rank, where something concerns all of them."""
LEAST_MESSAGE = 0.1
"""Time of a message of all ranks in T_F of a rank, if none is known: orders then have room for it."""


def with_vocabulary(build: Callable[[int], Schedule], m: int, barriers: int, costs: Costs | None) -> Schedule:
    """Return the table of m microbatches with S and T, its backwards moved as little as a short step allows.

    build: returns the table without them for so many microbatches, and raises ValueError where there is none
    costs: of its stages; without times of S and T the head is taken to be as long as a rank's forward

    Peaks are those of the table and at most `barriers` microbatches more. Raises ValueError where no order works.
    """
    base = build(m)
    if base.pairs:
        raise Refused(
            f"{base.name} has pairs of F and B, beside which S and T of a vocabulary over all ranks have no place; "
            "write their halves one after the other"
        )
    costs = _costs_to_place_with(base.placement, barriers, costs)
    short = _short(build, base)
    found = {
        moved: end
        for moved in range(barriers * base.placement.chunks + 1)
        if (end := _place(short, costs, barriers, moved)[1]) < inf
    }
    for moved, end in found.items():
        if end <= CLOSE * min(found.values()):
            table, whole = _place(base, costs, barriers, moved)
            if whole < inf:
                return replace(base, table=table, barriers=barriers)
    raise Refused(f"{base.name} has no place for S and T of {m} microbatches; take another number of them")


def evaluated(base: Schedule) -> Schedule:
    """Return a table of forwards alone with the S of all ranks behind them."""
    table, end = _place(base, _costs_to_place_with(base.placement, 1, None), barriers=1, moved=0, training=False)
    assert end < inf, "forwards wait for no S"
    return replace(base, table=table, barriers=1)


def _short(build: Callable[[int], Schedule], base: Schedule) -> Schedule:
    p, m = base.placement.ranks, base.micros
    if m <= FEW * p:
        return base
    try:
        return build((FEW - 1) * p + m % p)
    except Refused:
        return base


def _costs_to_place_with(placement: Placement, barriers: int, costs: Costs | None) -> Costs:
    """Return the costs with a head and messages that take some time."""
    costs = costs or uniform(placement, (1.0, 1.0, 1.0, 0.0))
    of_rank = sum(costs.forward) / placement.ranks
    if not any(costs.head):
        costs = with_head(costs, of_rank, placement.ranks, barriers)
    times = costs.meeting or MeetingTimes(*(costs.comm,) * 3)
    return replace(costs, meeting=MeetingTimes(*(max(time, LEAST_MESSAGE * of_rank) for time in times)))


def _moved(cells: Sequence[Action], later: int) -> Iterator[Action]:
    """Yield the cells with every backward behind so many more forwards, if there are as many."""
    forwards = [cell for cell in cells if cell.kind == FORWARD]
    done = before = 0
    for cell in cells:
        if cell.kind == FORWARD:
            before += 1
            continue
        wanted = min(len(forwards), before + later)
        yield from forwards[done:wanted]
        done = wanted
        yield cell
    yield from forwards[done:]


@dataclass
class _PlacingRank:
    """One rank while its S and T are placed.

    place:       of the next cell of the table
    logits:      the microbatch of the next S; logits_back: that of the next T
    since:       cells of the table since the last S; began: the start of the last one
    version:     of what the rank has been found to do next
    """

    cells: Sequence[Action]
    place: int = 0
    logits: int = 0
    logits_back: int = 0
    since: int = 0
    began: float = -1.0
    free: float = 0.0
    version: int = 0
    actions: list[Action] = field(default_factory=list)


def _place(base: Schedule, costs: Costs, barriers: int, moved: int, training: bool = True) -> tuple[Table, float]:
    """Return the table with S and T and the end of its step, infinity where the ranks come to wait for each other."""
    placing = _Placing(base, costs, barriers, moved, training)
    return placing.run()


class _Placing:
    """All ranks of a step while S and T are placed, with the ends known so far.

    ends:  of forwards and input gradients
    met:   of S and T of a microbatch: how many ranks have run it, and the latest end
    asked: when all ranks have asked for the output of the last stage for a microbatch
    """

    def __init__(self, base: Schedule, costs: Costs, barriers: int, moved: int, training: bool) -> None:
        where = base.placement
        self._where, self._micros, self._barriers, self._training = where, base.micros, barriers, training
        self._last = len(where.rank_of) - 1
        self._took, self._hop = durations(costs), hops(where, costs)
        self._meeting = costs.meeting or MeetingTimes(0.0, 0.0, 0.0)
        self._ranks = []
        for cells in base.table:
            own = [cell for cell in cells if isinstance(cell, Action)]
            assert len(own) == len(cells), "overlaps stay as they are"
            self._ranks.append(_PlacingRank(list(_moved(own, moved))))
        self._ends: dict[tuple[int, bool, int | None], float] = {}
        self._met: dict[tuple[str, int | None], tuple[int, float]] = {}
        self._asked: dict[int | None, float] = {}
        self._awake: list[tuple[float, int, int, Action]] = []

    def run(self) -> tuple[Table, float]:
        self._wake(range(len(self._ranks)))
        while self._awake:
            start, rank, version, action = heappop(self._awake)
            if rank == EVERYONE:
                # a rank that is at work asks for it behind that
                self._asked[action.micro] = max(start, *(state.free for state in self._ranks))
                self._wake(range(len(self._ranks)))
            elif version == self._ranks[rank].version:
                self._wake({rank, *self._run(rank, action, start)})
        backs = self._micros if self._training else 0
        done = all(
            state.place == len(state.cells) and (state.logits, state.logits_back) == (self._micros, backs)
            for state in self._ranks
        )
        table = tuple(tuple(state.actions) for state in self._ranks)
        return table, max(state.free for state in self._ranks) if done else inf

    def _wake(self, ranks: Iterable[int]) -> None:
        """Look again for what these ranks do next, and when."""
        for rank in ranks:
            state = self._ranks[rank]
            state.version += 1
            start, _, action = min(self._choices(rank, state), default=(inf, 0, None), key=lambda choice: choice[:2])
            if action and start < inf:
                heappush(self._awake, (start, rank, state.version, action))

    def _choices(self, rank: int, state: _PlacingRank) -> Iterator[tuple[float, int, Action]]:
        """Yield what the rank could do: when it could start, its place among those that start at once, the action."""
        own, waiting = self._where.of_rank[rank][0], state.logits - state.logits_back
        if state.logits < self._micros and (waiting < WAITING or not self._training):
            made = self._ends.get((self._last, False, state.logits), inf)
            there = self._asked.get(state.logits, inf) + self._meeting.share
            # behind a cell that is at work while it is on its way
            yield max(state.free, there), 0 if state.began >= made else 3, Action(own, LOGITS, state.logits)
        if self._training and waiting:
            urgent = self._barriers == 2 or (waiting == WAITING and state.since >= LATE)
            summed = self._all((LOGITS, state.logits_back)) + self._meeting.logits
            yield max(state.free, summed), 1 if urgent else 4, Action(own, LOGITS_BACK, state.logits_back)
        if state.place < len(state.cells):
            cell = state.cells[state.place]
            yield max(state.free, self._arrival(cell)), 2, cell

    def _all(self, point: tuple[str, int | None]) -> float:
        """Return when the last rank has run S or T of a microbatch."""
        ranks, end = self._met.get(point, (0, 0.0))
        return end if ranks == len(self._ranks) else inf

    def _arrival(self, cell: Action) -> float:
        """Return when what a cell of the table needs is there."""
        stage, kind, micro = cell
        if kind == WEIGHT or (kind == FORWARD and not stage):
            return 0.0
        if kind == FORWARD:
            return self._ends.get((stage - 1, False, micro), inf) + self._hop[0][stage - 1]
        if stage == self._last:
            return self._all((LOGITS if self._barriers == 1 else LOGITS_BACK, micro)) + self._meeting.gradient
        return self._ends.get((stage + 1, True, micro), inf) + self._hop[1][stage + 1]

    def _run(self, rank: int, action: Action, start: float) -> Iterable[int]:
        """Let the rank run the action; return those that may have waited for it."""
        (stage, kind, micro), state = action, self._ranks[rank]
        state.actions.append(action)
        state.free = end = start + self._took[kind][stage]
        everyone = range(len(self._ranks))
        if kind in (LOGITS, LOGITS_BACK):
            state.logits += kind == LOGITS
            state.logits_back += kind == LOGITS_BACK
            state.since = state.since if kind == LOGITS_BACK else 0
            ranks, latest = self._met.get((kind, micro), (0, 0.0))
            self._met[kind, micro] = (ranks + 1, max(latest, end))
            return everyone if ranks + 1 == len(self._ranks) else ()
        state.place += 1
        state.since += 1
        state.began = start
        if kind == WEIGHT:
            return ()
        back = kind in BACKWARD
        self._ends[stage, back, micro] = end
        if not back and stage == self._last:
            heappush(self._awake, (end, EVERYONE, 0, action))
            return ()
        if not back:
            return (self._where.rank_of[stage + 1],)
        return (self._where.rank_of[stage - 1],) if stage else ()
