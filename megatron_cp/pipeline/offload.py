"""Move activations away between a forward and its backward, so that no rank keeps more chunks than a limit.

One pass over a finished compute table, whatever rule it comes from. Host memory as the target is PipeOffload's
(arXiv:2503.01328); the rank across the pipeline, p - 1 - r, is BPipe's (ICML 2023), which for 1F1B keeps
ceil((p + 2) / 2) microbatches on every rank. For example rank 0 of 4 at a limit of 3:

    F0 F1 F2 EVICT2 F3 EVICT3 B0 F4 B1 LOAD2 F5 B2 LOAD3 B3 ...      EVICT runs beside the backward behind it, LOAD
                                                                     beside the forward
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from megatron_cp.errors import Refused
from megatron_cp.pipeline.action import BACKWARD, EVICT, FORWARD, LOAD, MOVES, Action, Cell, flat, halves
from megatron_cp.pipeline.costs import Costs
from megatron_cp.pipeline.list_schedule import EPSILON
from megatron_cp.pipeline.passes import walk, without_moves
from megatron_cp.pipeline.schedule import HOST, MOVE_TARGETS, PEER, Schedule
from megatron_cp.pipeline.simulate import peaks
from megatron_cp.registry import suggest
from megatron_cp.units import is_whole

AUTO = "auto"

StageMicro = tuple[int, int]


class Offload(NamedTuple):
    """The most chunks whose activations a rank keeps between forward and backward, and where it moves the others.

    limit: None for the largest that fits under memory caps
    """

    limit: int | None
    to: str = HOST


def balanced(p: int) -> int:
    """Return BPipe's limit ceil((p + 2) / 2): what ranks r and p - 1 - r of 1F1B keep together, shared evenly."""
    return (p + 3) // 2


def limit_of(text: str) -> int | None:
    """Return the limit that `text` says, None for `auto`; raises ValueError for anything but that and a number."""
    if text == AUTO:
        return None
    if not is_whole(text) or int(text) < 1:
        raise Refused(f"--pp-offload is a number of chunks from 1 up, or {AUTO}, got {text!r}")
    return int(text)


def offload(schedule: Schedule, plan: Offload) -> Schedule:
    """Return the compute table with moves under the limit of `plan`; one that stays below it by itself has none.

    Raises ValueError for a limit that the schedule cannot keep, saying the smallest, and for an unknown target.
    """
    if plan.to not in MOVE_TARGETS:
        raise Refused(
            f"activations move to {' or '.join(MOVE_TARGETS)}, got {plan.to!r}{suggest(plan.to, MOVE_TARGETS)}"
        )
    assert plan.limit is not None, "a limit is chosen with costs and caps"
    moved = _moved(schedule, plan.limit, plan.to)
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
    while max(most_kept(_moved(schedule, limit, to))) > limit:
        limit += 1
    return limit


def fitted(schedule: Schedule, costs: Costs, caps: Sequence[float], to: str = HOST) -> Schedule | None:
    """Return the table under the largest limit with which no rank exceeds its cap, in M_B; None if there is none.

    A larger limit moves less. Halving finds it, for a smaller one never keeps more.
    """

    def fits(moved: Schedule) -> bool:
        return all(peak <= cap + EPSILON for peak, cap in zip(peaks(moved, costs), caps, strict=True))

    if fits(schedule):
        return schedule
    low, high = smallest_limit(schedule, to), max(most_kept(schedule)) - 1
    best = None
    while low <= high:
        limit = (low + high + 1) // 2
        moved = _moved(schedule, limit, to)
        if max(most_kept(moved)) <= limit and fits(moved):
            best, low = moved, limit + 1
        else:
            high = limit - 1
    return best


def under(schedule: Schedule, plan: Offload, costs: Costs | None, caps: Sequence[float] | None) -> Schedule:
    """Return the table with moves under the limit of `plan`, or under the largest that keeps to the caps, in M_B.

    Raises ValueError as `offload` does, and where not even the smallest limit keeps to the caps.
    """
    if plan.limit is not None:
        return offload(schedule, plan)
    if costs is None or caps is None:
        raise Refused(f"--pp-offload {AUTO} fits a memory limit, which is missing; give one, or a number of chunks")
    found = fitted(schedule, costs, caps, plan.to)
    if found is None:
        least = smallest_limit(schedule, plan.to)
        most = max(peaks(_moved(schedule, least, plan.to), costs))
        raise Refused(
            f"{schedule.name} needs {most:g} M_B even with its smallest limit of {least} chunks on a rank, "
            f"above the cap of {min(caps):g} M_B"
        )
    return found


def described(schedule: Schedule) -> str:
    """Return in words how much a table moves, and which rank has no peer to move it to."""
    chunks, p = schedule.micros * schedule.placement.length, schedule.placement.ranks
    moved = sum(action.kind == EVICT for cells in schedule.table for action in flat(cells))
    most = max(most_kept(schedule))
    if not moved:
        return f"none, and nothing is gained: without them no rank keeps more than {most} chunks at once"
    alone = f"; rank {p // 2} in the middle has no peer and keeps its own" if schedule.to == PEER and p % 2 else ""
    return f"{moved} of {chunks} chunks to the {schedule.to} and back, at most {most} stay on a rank{alone}"


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


def _moved(schedule: Schedule, limit: int, to: str) -> Schedule:
    if max(most_kept(schedule)) <= limit:
        return schedule
    p = len(schedule.table)
    table = tuple(
        # the middle rank of an odd number has no peer
        cells if to == PEER and 2 * rank == p - 1 else tuple(_with_moves(cells, limit))
        for rank, cells in enumerate(schedule.table)
    )
    return replace(schedule, table=table, to=to)


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
