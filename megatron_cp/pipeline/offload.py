"""Move activations away between a forward and its backward, so that no rank keeps more chunks than a limit.

One pass over a finished compute table, whatever rule it comes from. Host memory as the target is PipeOffload's
(arXiv:2503.01328); the rank across the pipeline, p - 1 - r, is BPipe's (ICML 2023), which for 1F1B keeps
ceil((p + 2) / 2) microbatches on every rank. For example rank 0 of 4 at a limit of 3:

    F0 F1 F2 EVICT2 F3 EVICT3 B0 F4 B1 LOAD2 F5 B2 LOAD3 B3 ...      EVICT runs beside the backward behind it, LOAD
                                                                     beside the forward
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from megatron_cp.errors import Refused
from megatron_cp.pipeline.action import BACKWARD, EVICT, FORWARD, LOAD, MOVES, Action, Cell, flat, halves
from megatron_cp.pipeline.passes import walk, without_moves
from megatron_cp.pipeline.schedule import HOST, MOVE_TARGETS, PEER, Schedule
from megatron_cp.registry import suggest

StageMicro = tuple[int, int]


class Offload(NamedTuple):
    """The most chunks whose activations a rank keeps between forward and backward, and where it moves the others."""

    limit: int
    to: str = HOST


def balanced(p: int) -> int:
    """Return BPipe's limit ceil((p + 2) / 2): what ranks r and p - 1 - r of 1F1B keep together, shared evenly."""
    return (p + 3) // 2


def offload(schedule: Schedule, plan: Offload) -> Schedule:
    """Return the compute table with moves under `plan`; one that stays below the limit by itself comes back unchanged.

    Raises ValueError for a limit that the schedule cannot keep, saying the smallest, and for an unknown target.
    """
    if plan.to not in MOVE_TARGETS:
        raise Refused(
            f"activations move to {' or '.join(MOVE_TARGETS)}, got {plan.to!r}{suggest(plan.to, MOVE_TARGETS)}"
        )
    moved = _moved(schedule, plan)
    if max(most_kept(moved)) > plan.limit:
        chunks = f"{plan.limit} chunk{'' if plan.limit == 1 else 's'}"
        raise Refused(
            f"{schedule.name} cannot keep to {chunks} per rank with the others on the {plan.to}; "
            f"its smallest limit is {smallest_limit(schedule, plan.to)}"
        )
    return moved


def smallest_limit(schedule: Schedule, to: str = HOST) -> int:
    """Return the fewest chunks to which moves can hold every rank, those lent to it counted with its own."""
    # a rank and its peer hold at most twice the limit together
    limit = -(-max(most_kept(schedule)) // 2) if to == PEER else 1
    while max(most_kept(_moved(schedule, Offload(limit, to)))) > limit:
        limit += 1
    return limit


def described(schedule: Schedule, plan: Offload) -> str:
    """Return in words how much a table under `plan` moves, and which rank has no peer to move it to."""
    chunks, p = schedule.micros * len(schedule.placement.rank_of), schedule.placement.ranks
    moved = sum(action.kind == EVICT for cells in schedule.table for action in flat(cells))
    if not moved:
        return f"none: no rank keeps more than {plan.limit} chunks at once, so the limit gains nothing"
    alone = f"; rank {p // 2} in the middle has no peer and keeps its own" if plan.to == PEER and p % 2 else ""
    return f"{moved} of {chunks} chunks to the {plan.to} and back, at most {plan.limit} stay on a rank{alone}"


def most_kept(schedule: Schedule) -> list[int]:
    """Return the most chunks on each rank at once, from their F to their backward, with those of its peer.

    Counts the order of the tables, in which a move takes no time.
    """
    kept, most = [0] * len(schedule.table), [0] * len(schedule.table)
    moves = [_moves_behind(cells) for cells in schedule.table]

    def change(rank: int, by: int) -> None:
        kept[rank] += by
        most[rank] = max(most[rank], kept[rank])

    for rank, cell in walk(without_moves(schedule)):
        for action in halves(cell):
            if action.kind == FORWARD or action.kind in BACKWARD:
                change(rank, 1 if action.kind == FORWARD else -1)
        for action in moves[rank].get(cell, ()):
            back = action.kind == LOAD
            change(rank, 1 if back else -1)
            if schedule.to == PEER:
                change(len(kept) - 1 - rank, -1 if back else 1)
    return most


def _moves_behind(cells: Iterable[Cell]) -> dict[Cell, list[Action]]:
    behind: dict[Cell, list[Action]] = defaultdict(list)
    before: Cell | None = None
    for cell in cells:
        if isinstance(cell, Action) and cell.kind in MOVES:
            assert before, "the first action of a rank is a forward"
            behind[before].append(cell)
        else:
            before = cell
    return behind


def _moved(schedule: Schedule, plan: Offload) -> Schedule:
    if max(most_kept(schedule)) <= plan.limit:
        return replace(schedule, to=plan.to)
    p = len(schedule.table)
    table = tuple(
        # the middle rank of an odd number has no peer
        cells if plan.to == PEER and 2 * rank == p - 1 else tuple(_with_moves(cells, plan.limit))
        for rank, cells in enumerate(schedule.table)
    )
    return replace(schedule, table=table, to=plan.to)


def _with_moves(cells: tuple[Cell, ...], limit: int) -> Iterator[Cell]:
    """Yield the cells, behind them EVICT of what is needed last once `limit` are kept, and LOAD of what comes next."""
    order = [(stage, micro or 0) for stage, kind, micro in flat(cells) if kind in BACKWARD]
    place = {chunk: number for number, chunk in enumerate(order)}
    left = sum(action.kind == FORWARD for action in flat(cells))
    here: set[StageMicro] = set()
    away: set[StageMicro] = set()
    returned = 0
    for cell in cells:
        yield cell
        for stage, kind, micro in halves(cell):
            if kind == FORWARD:
                here.add((stage, micro or 0))
                left -= 1
            elif kind in BACKWARD:
                here.remove((stage, micro or 0))
                returned += 1
        kinds = {action.kind for action in halves(cell)}
        if kinds & BACKWARD and returned < len(order) and (due := order[returned]) in away:
            away.remove(due)
            here.add(due)
            yield Action(due[0], LOAD, due[1])
        if FORWARD in kinds and left and len(here) >= limit:
            last = max(here, key=place.__getitem__)
            if place[last] > returned:
                here.remove(last)
                away.add(last)
                yield Action(last[0], EVICT, last[1])
