"""Turn the compute table of a rule into the table an executor runs: check, merge, add reductions, add transfers."""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial

from megatron_cp.pipeline.action import (
    BACKWARD,
    COMPUTE,
    EVICT,
    FORWARD,
    FULL,
    HEAD,
    INPUT,
    LENDERS,
    LOAD,
    LOGITS,
    LOGITS_BACK,
    MOVES,
    RECV_B,
    RECV_F,
    REDUCE,
    SEND_B,
    SEND_F,
    SUMS,
    WEIGHT,
    Action,
    Cell,
    Overlap,
    first_half,
    halves,
)
from megatron_cp.pipeline.placement import Placement
from megatron_cp.pipeline.schedule import PEER, BadSchedule, Schedule


def check(schedule: Schedule) -> Schedule:
    """Return the schedule itself if its compute table is complete, ordered and free of deadlock.

    Every stage runs on its own rank; every microbatch of every stage has one F, and after it either one B or one I and
    then one W; W's of a stage come in the order of its I's, and no B overtakes them. Activations leave with EVICT
    between their F and their backward, and are back with LOAD before it. Where the LM head lies on all ranks, each of
    them has one S and then one T of every microbatch, written with its first stage. Raises BadSchedule.
    """
    for rank, actions in enumerate(schedule.table):
        _check_rank(schedule, rank, actions)
    deque(walk(without_moves(schedule)), maxlen=0)
    return schedule


def _check_rank(schedule: Schedule, rank: int, cells: Iterable[Cell]) -> None:
    stages = schedule.placement.of_rank[rank]
    forwarded: set[tuple[int, int | None]] = {(stage, micro) for stage in stages for micro in schedule.begun(stage)}
    returned: set[tuple[int, int | None]] = set()
    pending: dict[int, deque[int | None]] = defaultdict(deque)
    away: set[tuple[int, int | None]] = set()
    cells, place = tuple(cells), -1
    seen: set[Action] = set()
    for place, cell in enumerate(cells):
        for action in halves(cell):
            if action.kind in HEAD:
                fault = _misplaced_head(schedule, stages[0], action, seen)
                seen.add(action)
                if fault:
                    raise BadSchedule(schedule, f"rank {rank}, {action}: {fault}", [(rank, place)])
                continue
            fault = _misplaced_move(action, forwarded - returned, away) or _fault(
                schedule, rank, action, forwarded, returned, pending
            )
            if fault:
                raise BadSchedule(schedule, f"rank {rank}, {action}: {fault}", [(rank, place)])
    asked = {(stage, micro) for stage in stages for micro in schedule.forwards(stage)}
    expected = {(stage, micro) for stage in stages for micro in schedule.micros_of(stage)}
    missing = [Action(stage, FORWARD, micro) for stage, micro in sorted(asked - forwarded)]
    missing += [Action(stage, INPUT, micro) for stage, micro in sorted(expected - returned)]
    missing += [Action(stage, WEIGHT, micro) for stage, micros in pending.items() for micro in micros]
    if schedule.barriers:
        wanted = {Action(stages[0], kind, micro) for kind in sorted(HEAD) for micro in range(schedule.micros)}
        missing += sorted(wanted - seen)
    if missing:
        raise BadSchedule(schedule, f"rank {rank} never runs {', '.join(map(str, missing[:4]))}", [(rank, place)])


def _misplaced_head(schedule: Schedule, stage: int, action: Action, seen: set[Action]) -> str | None:
    if not schedule.barriers:
        return "the LM head lies on the last rank"
    if action.stage != stage:
        return f"S and T of this rank are those of stage {stage}"
    if action.micro is None or not 0 <= action.micro < schedule.micros:
        return f"not an action of microbatches 0 to {schedule.micros - 1}"
    if action in seen:
        return "runs twice"
    if action.kind == LOGITS_BACK and action._replace(kind=LOGITS) not in seen:
        return "runs before its S"
    return None


def _misplaced_move(
    action: Action, alive: set[tuple[int, int | None]], away: set[tuple[int, int | None]]
) -> str | None:
    key = (action.stage, action.micro)
    if action.kind == EVICT:
        fault = None if key in alive - away else "has no activations to move"
        away.add(key)
        return fault
    if action.kind == LOAD:
        fault = None if key in away else "was not moved away"
        away.discard(key)
        return fault
    return "runs before the LOAD of its activations" if action.kind in BACKWARD and key in away else None


def _fault(
    schedule: Schedule,
    rank: int,
    action: Action,
    forwarded: set[tuple[int, int | None]],
    returned: set[tuple[int, int | None]],
    pending: dict[int, deque[int | None]],
) -> str | None:
    stage, kind, micro = action
    key = (stage, micro)
    if kind in MOVES:
        return None
    if stage not in schedule.placement.of_rank[rank]:
        return f"stage {stage} is not on this rank"
    first, end = schedule.micros_of(stage).start, schedule.micros_of(stage).stop
    if kind == FORWARD:
        end = schedule.forwards(stage).stop
    if kind not in COMPUTE or micro is None or not first <= micro < end:
        return f"not a compute action of microbatches {first} to {end - 1}"
    if kind == FORWARD:
        fault = "runs twice" if key in forwarded else None
        forwarded.add(key)
        return fault
    if kind == WEIGHT:
        fault = None if pending[stage] and pending[stage][0] == micro else "is not the oldest I waiting for its W"
        if not fault:
            pending[stage].popleft()
        return fault
    if key not in forwarded:
        return "runs before its F"
    if key in returned:
        return "runs twice"
    returned.add(key)
    if kind == INPUT:
        pending[stage].append(micro)
        return None
    return f"overtakes the W of microbatch {pending[stage][0]}" if pending[stage] else None


def walk(schedule: Schedule) -> Iterator[tuple[int, Cell]]:
    """Walk all ranks at once: every round each rank runs its next compute cell if what that waits for is there.

    All ranks come to a message of all ranks in the same round.
    Yields (rank, cell) in an order in which they can run; raises BadSchedule naming every rank's waiting cell.
    """
    places = [0] * len(schedule.table)
    stages = range(len(schedule.placement.rank_of))
    done = {Action(stage, FORWARD, micro) for stage in stages for micro in schedule.begun(stage)}
    while any(place < len(actions) for place, actions in zip(places, schedule.table, strict=True)):
        heads = [
            (rank, actions[place])
            for rank, (place, actions) in enumerate(zip(places, schedule.table, strict=True))
            if place < len(actions)
        ]
        met = Counter(cell[1:] for _, cell in heads if isinstance(cell, Action) and cell.kind in SUMS)
        ready = [
            (rank, cell)
            for rank, cell in heads
            if (
                met[cell[1:]] == len(places)
                if isinstance(cell, Action) and cell.kind in SUMS
                else _runnable(schedule, cell, done)
            )
        ]
        if not ready:
            raise deadlock(schedule, places)
        for rank, cell in ready:
            places[rank] += 1
            done.update(map(first_half, halves(cell)))
        yield from ready


def awaited(schedule: Schedule, action: Action) -> Action | None:
    """Return the action that must have run before `action`, besides its rank's earlier ones; a backward by its I."""
    stage, kind, micro = action
    if kind == FORWARD:
        return None if schedule.placement.first(stage) else Action(stage - 1, FORWARD, micro)
    if kind == WEIGHT:
        return Action(stage, INPUT, micro)
    if kind == LOGITS_BACK:
        return action._replace(kind=LOGITS)
    if kind == LOGITS:
        return Action(schedule.placement.length - 1, FORWARD, micro)
    return Action(stage, FORWARD, micro) if schedule.placement.last(stage) else Action(stage + 1, INPUT, micro)


def barrier(schedule: Schedule, action: Action) -> list[Action]:
    """Return the S or T of all ranks that must have run before `action`: before a T, and the last stage's backward."""
    last = len(schedule.placement.rank_of) - 1
    if action.kind != LOGITS_BACK and (action.kind not in BACKWARD or action.stage != last or not schedule.barriers):
        return []
    kind = LOGITS_BACK if schedule.barriers == 2 and action.kind != LOGITS_BACK else LOGITS
    return [Action(stages[0], kind, action.micro) for stages in schedule.placement.of_rank]


def _runnable(schedule: Schedule, cell: Cell, done: set[Action]) -> bool:
    return done.issuperset(awaited_by(schedule, cell))


def awaited_by(schedule: Schedule, cell: Cell) -> list[Action]:
    """Return the actions that must have run before `cell`, besides its rank's earlier ones."""
    found: list[Action] = []
    for action in halves(cell):
        before = awaited(schedule, action)
        found += ([before] if before else []) + barrier(schedule, action)
    return found


def deadlock(schedule: Schedule, places: list[int]) -> BadSchedule:
    """Return the error for ranks that all stand still at `places`."""
    stuck = [(rank, place) for rank, place in enumerate(places) if place < len(schedule.table[rank])]
    cells = [(rank, schedule.table[rank][place]) for rank, place in stuck]
    reasons = [
        f"rank {rank} at {cell} for {' and '.join(map(str, awaited_by(schedule, cell)))}" for rank, cell in cells
    ]
    return BadSchedule(schedule, f"deadlock: {'; '.join(reasons)}", stuck)


def merge(schedule: Schedule) -> Schedule:
    """Return the schedule with each I that its own W directly follows written as one B: no queue, less memory.

    Where another rank waits for the input gradient they stay apart, for it would wait for W too.
    """
    ours = partial(_stays_on_rank, schedule.placement)
    return replace(schedule, table=tuple(tuple(_merged(actions, ours)) for actions in schedule.table))


def _stays_on_rank(placement: Placement, stage: int) -> bool:
    """True if no other rank uses the input gradient of `stage`."""
    return placement.first(stage) or placement.rank_of[stage - 1] == placement.rank_of[stage]


def _merged(cells: Iterable[Cell], mergeable: Callable[[int], bool]) -> Iterator[Cell]:
    held: Action | None = None
    for cell in cells:
        if held and cell == held._replace(kind=WEIGHT):
            yield held._replace(kind=FULL)
            held = None
            continue
        if held:
            yield held
        held = cell if isinstance(cell, Action) and cell.kind == INPUT and mergeable(cell.stage) else None
        if not held:
            yield cell
    if held:
        yield held


def add_reductions(schedule: Schedule) -> Schedule:
    """Return the schedule with REDUCE of every stage right after the last action that adds to its gradients."""
    return replace(schedule, table=tuple(tuple(_reduced(actions)) for actions in schedule.table))


def _reduced(cells: tuple[Cell, ...]) -> Iterator[Cell]:
    last: dict[int, int] = {}
    for place, cell in enumerate(cells):
        last |= {action.stage: place for action in halves(cell) if action.kind in (FULL, WEIGHT, LOGITS_BACK)}
    for place, cell in enumerate(cells):
        yield cell
        for action in halves(cell):
            if last.get(action.stage) == place:
                yield Action(action.stage, REDUCE)


def add_transfers(schedule: Schedule) -> Schedule:
    """Return the schedule with sends and receives, both written down at the moment the tensor exists.

    Since send and receive enter their ranks' lists together while all ranks are walked at once, both sides of every
    channel agree on the order, and even blocking transfers cannot deadlock. A hand-over on the same rank has none.
    The same holds for moves to a peer: its HOLD or GIVE is written down with the owner's EVICT or LOAD.
    """
    lists: list[list[Cell]] = [[] for _ in schedule.table]
    rest = [_behind(cells) for cells in schedule.table]
    for rank, cell in walk(without_moves(schedule)):
        lists[rank].append(cell)
        for action in halves(cell):
            for receiver, send, receive in _transfer(schedule, rank, action):
                lists[rank].append(send)
                lists[receiver].append(receive)
        for action in rest[rank].get(cell, ()):
            lists[rank].append(action)
            if action.kind in LENDERS and schedule.to == PEER:
                lists[schedule.placement.ranks - 1 - rank].append(action._replace(kind=LENDERS[action.kind]))
    return replace(schedule, table=tuple(map(tuple, lists)))


def without_moves(schedule: Schedule) -> Schedule:
    """Return the schedule with nothing but its compute cells and the messages of all ranks."""
    return replace(schedule, table=tuple(tuple(filter(_computes, cells)) for cells in schedule.table), to=None)


def _computes(cell: Cell) -> bool:
    return isinstance(cell, Overlap) or cell.kind in COMPUTE or cell.kind in SUMS


def _behind(cells: Iterable[Cell]) -> dict[Cell, list[Action]]:
    """The other cells, under the compute cell that they follow."""
    behind: dict[Cell, list[Action]] = defaultdict(list)
    before: Cell | None = None
    for cell in cells:
        if isinstance(cell, Action) and not _computes(cell):
            if before:
                behind[before].append(cell)
        else:
            before = cell
    return behind


def _transfer(schedule: Schedule, rank: int, action: Action) -> Iterator[tuple[int, Action, Action]]:
    stage, kind, micro = action
    where, rank_of = schedule.placement, schedule.placement.rank_of
    if kind == FORWARD and not where.last(stage) and rank_of[stage + 1] != rank:
        yield rank_of[stage + 1], Action(stage, SEND_F, micro), Action(stage + 1, RECV_F, micro)
    if kind in BACKWARD and not where.first(stage) and rank_of[stage - 1] != rank:
        yield rank_of[stage - 1], Action(stage, SEND_B, micro), Action(stage - 1, RECV_B, micro)
