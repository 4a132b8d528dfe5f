"""Write messages of all ranks, for a vocabulary over all of them, in an order in which no ranks wait in a circle.

A message of all ranks (a sum, or what one rank brings to all) is over when the last one has come to it. On CUDA a rank
computes on meanwhile; where all of its work goes through one queue (CUDA_DEVICE_MAX_CONNECTIONS = 1) it stands still.
So each message is written where it is made or needed next, and further behind only where ranks would stand still for
each other:

    rank 0    S0 SUM_S0 F4 …        SUM_S0 needs the S0 of rank 1,
    rank 1    F4 S0 SUM_S0 …        which needs its F4, which needs that of rank 0: so rank 0 has it behind F4
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from megatron_cp.pipeline.action import (
    BACKWARD,
    FORWARD,
    FULL,
    INPUT,
    LOGITS,
    LOGITS_BACK,
    REDUCE,
    SHARE,
    SHARE_E,
    SUM_E,
    SUM_S,
    SUM_T,
    SUMS,
    WEIGHT,
    Action,
    Cell,
    first_half,
    halves,
)
from megatron_cp.pipeline.passes import awaited_by
from megatron_cp.pipeline.schedule import Schedule
from megatron_cp.pipeline.vocabulary import returned_before

AHEAD = 2
"""Forwards of the first stage after which its next embedding is looked up ahead of it."""

TIMES = {FORWARD: 1.0, INPUT: 1.0, WEIGHT: 1.0, FULL: 2.0, LOGITS: 0.5, LOGITS_BACK: 0.5}
"""Times of cells, by which ranks are walked."""

Message = tuple[str, int | None]


def add_sums(schedule: Schedule) -> Schedule:
    """Return the table with what all ranks send each other, each kind in the same order of microbatches on every rank.

    SHARE brings the output of the last stage to the others, SUM_S adds up what their S made, and where there are two
    barriers SUM_T what their T made. A rank asks for the next output before it works on the last one. SUM_E adds up
    what all ranks look up, AHEAD forwards of the first stage ahead. SHARE_E brings the gradient of the embedding to all
    ranks behind the S that is next on the first rank. The last ones come at the end, and the reductions of the stages
    that the rank's rows belong to behind them.
    """
    return _Writing(schedule).run() if schedule.barriers else schedule


@dataclass
class _WritingRank:
    """One rank while messages are written.

    cells:   with each message at its first place; place: of the next one
    passed:  messages that the rank has come to and gone on from, for others were not there
    early:   messages that were written before the rank came to them
    free:    when its last cell ends
    """

    cells: Sequence[Cell]
    place: int = 0
    passed: list[Message] = field(default_factory=list)
    early: set[Message] = field(default_factory=set)
    free: float = 0.0
    table: list[Cell] = field(default_factory=list)

    @property
    def next(self) -> Cell | None:
        return self.cells[self.place] if self.place < len(self.cells) else None


class _Writing:
    """All ranks of a step, while they are walked at once and messages are written."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule, self._where = schedule, schedule.placement
        self._maker = self._where.rank_of[-1]
        returned = returned_before(schedule.table[0])
        self._ranks = [
            _WritingRank(list(_first_places(schedule, rank, cells, returned)))
            for rank, cells in enumerate(schedule.table)
        ]
        self._at: dict[Message, set[int]] = defaultdict(set)
        self._over: set[Message] = set()
        self._ends: dict[Action, float] = {}
        self._asked: deque[tuple[float, Message]] = deque()

    def run(self) -> Schedule:
        for micro in range(min(AHEAD, self._schedule.micros)):
            self._write((SUM_E, micro))
        while any(state.next for state in self._ranks):
            if not self._come() and not self._compute() and not self._free_source():
                self._pass_one()
        return replace(self._schedule, table=tuple(tuple(state.table) for state in self._ranks))

    def _come(self) -> bool:
        """Let all ranks come to their next message, and write one to which all have come."""
        for rank, state in enumerate(self._ranks):
            while (message := _message(state.next)) in state.early:
                state.place += 1
            if message:
                self._at[message].add(rank)
                if len(self._at[message]) == len(self._ranks):
                    self._write(message)
                    return True
        return False

    def _compute(self) -> bool:
        """Run the cell that can start first."""
        ready = [
            (max(state.free, self._arrival(cell)), rank)
            for rank, state in enumerate(self._ranks)
            if (cell := state.next) and not _message(cell) and self._runnable(cell)
        ]
        if not ready and self._asked:
            self._write(self._asked.popleft()[1])
            return True
        if not ready:
            return False
        start, rank = min(ready)
        if self._asked and self._asked[0][0] <= start:
            self._write(self._asked.popleft()[1])
            return True
        state = self._ranks[rank]
        cell = state.next
        assert cell
        state.place += 1
        state.table.append(cell)
        state.free = start + sum(TIMES.get(action.kind, 0.0) for action in halves(cell))
        for action in halves(cell):
            self._ends[first_half(action)] = state.free
            if action[:2] == (0, FORWARD) and (ahead := (action.micro or 0) + AHEAD) < self._schedule.micros:
                self._asked.append((state.free, (SUM_E, ahead)))
        return True

    def _arrival(self, cell: Cell) -> float:
        if isinstance(cell, Action) and cell.kind == REDUCE:
            return 0.0
        return max((self._ends[action] for action in awaited_by(self._schedule, cell)), default=0.0)

    def _runnable(self, cell: Cell) -> bool:
        if isinstance(cell, Action) and cell.kind == REDUCE:
            return True
        needs: list[Message] = []
        for stage, kind, micro in halves(cell):
            if (stage, kind) == (0, FORWARD):
                needs.append((SUM_E, micro))
            elif kind == LOGITS:
                needs.append((SHARE, micro))
            elif kind == LOGITS_BACK:
                needs.append((SUM_S, micro))
            elif kind in BACKWARD and stage == self._where.length - 1:
                needs.append((SUM_S if self._schedule.barriers == 1 else SUM_T, micro))
        return self._over.issuperset(needs) and all(action in self._ends for action in awaited_by(self._schedule, cell))

    def _write(self, message: Message) -> None:
        """Write a message on all ranks, wherever they are."""
        self._over.add(message)
        for stages, state in zip(self._where.of_rank, self._ranks, strict=True):
            state.table.append(Action(stages[0], *message))
            if message in state.passed:
                state.passed.remove(message)
            elif _message(state.next) == message:
                state.place += 1
            elif message[0] != SUM_E:
                state.early.add(message)

    def _free_source(self) -> bool:
        """Write the first message that one rank brings to all and whose maker has come to it."""
        for kind, source in ((SHARE, self._maker), (SHARE_E, 0)):
            micros = [micro for (of, micro), ranks in self._at.items() if of == kind and source in ranks]
            if waiting := [micro for micro in micros if (kind, micro) not in self._over]:
                self._write((kind, waiting[0]))
                return True
        return False

    def _pass_one(self) -> None:
        """Let one rank go on from a message that others have not come to: one for which others stand still."""
        rank = next(rank for rank in self._waited_for() if _message(self._ranks[rank].next))
        state = self._ranks[rank]
        message = _message(state.next)
        assert message
        state.passed.append(message)
        state.place += 1

    def _waited_for(self) -> Iterator[int]:
        """Yield ranks, first those that a rank waits for that has come to no message, one behind the other."""
        computing = [rank for rank, state in enumerate(self._ranks) if state.next and not _message(state.next)]
        for start in computing:
            rank, seen = start, set()
            while rank not in seen:
                seen.add(rank)
                cell = self._ranks[rank].next
                if cell is None or _message(cell):
                    yield rank
                    break
                missing = [action for action in awaited_by(self._schedule, cell) if action not in self._ends]
                if missing:
                    rank = self._where.rank_of[missing[0].stage]
        # what comes from one rank first, for no other rank's work is in it
        waiting = [(rank, message) for rank, state in enumerate(self._ranks) if (message := _message(state.next))]
        yield from (rank for rank, (kind, _) in waiting if kind in (SHARE, SHARE_E))
        yield from (rank for rank, _ in waiting)


def _message(cell: Cell | None) -> Message | None:
    return (cell.kind, cell.micro) if isinstance(cell, Action) and cell.kind in SUMS else None


def _first_places(
    schedule: Schedule, rank: int, cells: Iterable[Cell], returned: dict[int | None, list[int | None]]
) -> Iterator[Cell]:
    """Yield a rank's cells with each message where it is made, or before what needs the one before it."""
    where = schedule.placement
    own, last = where.of_rank[rank], len(where.rank_of) - 1
    reductions: list[Cell] = []
    for cell in cells:
        stage, kind, micro = cell if isinstance(cell, Action) else cell.forward
        if kind == REDUCE and stage in (own[0], own[-1]):
            reductions.append(cell)
            continue
        if kind == LOGITS and last not in own:
            assert micro is not None
            for wanted in range(micro + 1 if micro else 0, min(micro + 2, schedule.micros)):
                yield Action(stage, SHARE, wanted)
        yield cell
        if kind == FORWARD and stage == last:
            yield Action(own[0], SHARE, micro)
        if kind == LOGITS:
            yield Action(stage, SUM_S, micro)
            yield from (Action(stage, SHARE_E, other) for other in returned[micro])
        if kind == LOGITS_BACK and schedule.barriers == 2:
            yield Action(stage, SUM_T, micro)
    yield from (Action(own[0], SHARE_E, other) for other in returned[None])
    yield from reductions
