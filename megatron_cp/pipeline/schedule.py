"""A schedule: per rank the list of its actions, with a text form that can be read back."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_cp.errors import Refused
from megatron_cp.pipeline.action import (
    FORWARD,
    FULL,
    HEAD,
    INPUT,
    LENDERS,
    LOGITS_BACK,
    MOVES,
    Cell,
    Overlap,
    flat,
    parse_cell,
)
from megatron_cp.pipeline.placement import ONE_PIPE, Placement, two_way

HOST, PEER = "host", "peer"
MOVE_TARGETS = (HOST, PEER)

Table = tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Schedule:
    """The actions of every rank, in order.

    micros: microbatches of one step; a slice of a sequence counts as one
    table:  one tuple of cells per rank
    to:     where EVICT moves activations: to the rank's own host, or to its peer, rank p - 1 - r; None if nothing moves
    slices: of each sequence: slice i of sequence j is microbatch j * slices + i
    before: forwards of each stage that ran in the step before, of the first microbatches; empty where none did
    after:  forwards of each stage that run for the steps behind this one, microbatches from `micros` on; empty for none
    barriers: at which all ranks wait for each other in every microbatch, for the LM head lies on all of them; 0 if it
            lies on the last one
    """

    name: str
    placement: Placement
    micros: int
    table: Table
    to: str | None = None
    slices: int = 1
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    barriers: int = 0

    @property
    def sequences(self) -> int:
        """Whole microbatches of one step."""
        return self.micros // self.slices

    @property
    def pairs(self) -> int:
        """Forwards that run beside a backward, on all ranks."""
        return sum(isinstance(cell, Overlap) for cells in self.table for cell in cells)

    def micros_of(self, stage: int) -> range:
        """Return the microbatches that go through this stage: an equal share for each pipe, in order."""
        share, pipe = self.micros // self.placement.pipes, self.placement.pipe_of(stage)
        return range(pipe * share, (pipe + 1) * share)

    def forwards(self, stage: int) -> range:
        """Return the microbatches whose forwards on this stage are in the table."""
        micros = self.micros_of(stage)
        return range(
            micros.start + self._in_flight(self.before, stage), micros.stop + self._in_flight(self.after, stage)
        )

    def begun(self, stage: int) -> range:
        """Return the microbatches whose forwards on this stage ran before the table begins."""
        return range(self._in_flight(self.before, stage))

    @staticmethod
    def _in_flight(counts: tuple[int, ...], stage: int) -> int:
        return counts[stage] if counts else 0

    def text(self) -> str:
        """Return one line per rank, cells separated by blanks; `parse` reads it back."""
        return "\n".join(" ".join(map(str, actions)) for actions in self.table)


class BadSchedule(Refused):
    """A table that cannot run: the message is the reason, then the grid with the failing cells marked."""

    def __init__(self, schedule: Schedule, reason: str, failing: Sequence[tuple[int, int]]) -> None:
        self.schedule, self.reason, self.failing = schedule, reason, failing
        super().__init__(f"{schedule.name}: {reason}\n{grid(schedule, failing)}")


def parse(text: str, name: str = "table") -> Schedule:
    """Return the schedule written as `text`, its placement taken from the stages of each line.

    Raises ValueError for text that is not an action, for an empty table, and for stages that are missing or shared by
    ranks.
    """
    table = tuple(tuple(map(parse_cell, line.split())) for line in text.splitlines() if line.strip())
    if not table:
        raise Refused(f"{name} has no action; write a line of actions for each rank, such as 0F0 0B0")
    lent = {rank: {a for a in flat(cells) if a.kind in LENDERS.values()} for rank, cells in enumerate(table)}
    owners = {(a.stage, rank) for rank, cells in enumerate(table) for a in flat(cells) if a not in lent[rank]}
    shared = [stage for stage, count in Counter(stage for stage, _ in owners).items() if count > 1]
    rank_of = tuple(rank for _, rank in sorted(owners))
    if shared or sorted(stage for stage, _ in owners) != list(range(len(rank_of))):
        raise Refused(f"every stage from 0 up belongs on exactly one rank; found (stage, rank) {sorted(owners)}")
    forwards = [action.micro or 0 for cells in table for action in flat(cells) if action.kind == FORWARD]
    micros = 1 + max(forwards, default=0)
    moving = any(action.kind in MOVES for cells in table for action in flat(cells))
    to = PEER if any(lent.values()) else HOST if moving else None
    placement = _named(rank_of, len(table), two_pipes=_apart(table, len(rank_of) // 2))
    return Schedule(name, placement, micros, table, to, barriers=_barriers(table, rank_of))


def _apart(table: Table, half: int) -> bool:
    """Return True if no microbatch goes through both halves of the stages: two pipes, not one V."""
    forwards = [action for cells in table for action in flat(cells) if action.kind == FORWARD]
    first, second = ({a.micro for a in forwards if (a.stage < half) == before} for before in (True, False))
    return bool(first and second) and not first & second


def _barriers(table: Table, rank_of: tuple[int, ...]) -> int:
    """Two where the last stage's backwards follow T, one where they follow S, none without these."""
    actions = list(flat(table[rank_of[-1]]))
    if not any(action.kind in HEAD for cells in table for action in flat(cells)):
        return 0
    places = {action[1:]: place for place, action in enumerate(actions) if action.stage == len(rank_of) - 1}
    backward = min(places.get((kind, 0), len(actions)) for kind in (FULL, INPUT))
    own = next((place for place, action in enumerate(actions) if action[1:] == (LOGITS_BACK, 0)), len(actions))
    return 2 if own < backward else 1


def _named(rank_of: tuple[int, ...], p: int, two_pipes: bool) -> Placement:
    known = [make(p, len(rank_of) // p) for make in ONE_PIPE.values()]
    if two_pipes and p % 2 == 0:
        known.insert(0, two_way(p, len(rank_of) // p // 2))
    return next((placement for placement in known if placement.rank_of == rank_of), Placement("custom", rank_of))


def grid(schedule: Schedule, failing: Sequence[tuple[int, int]] = (), around: int = 8) -> str:
    """Return the part of the table around `failing` as text, those cells (rank, position) between angle brackets."""
    places = [place for _, place in failing]
    first = max(0, min(places, default=0) - around)
    last = max(places, default=2 * around) + around
    marked = set(failing)
    rows = []
    for rank, actions in enumerate(schedule.table):
        cells = [
            f">{action}<" if (rank, place) in marked else f" {action} "
            for place, action in enumerate(actions[first : last + 1], first)
        ]
        head, tail = "... " if first else "", " ..." if len(actions) > last + 1 else ""
        rows.append(f"rank {rank:>2}: {head}{' '.join(f'{cell:<7}' for cell in cells).rstrip()}{tail}")
    return "\n".join(rows)
