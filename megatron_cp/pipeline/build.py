"""Build the checked table of a schedule from its name and the user's sizes, or say why there is none."""

from collections.abc import Iterator, Sequence

from megatron_cp.errors import Refused
from megatron_cp.pipeline import SCHEDULES, Rule
from megatron_cp.pipeline.costs import Costs
from megatron_cp.pipeline.list_schedule import EPSILON
from megatron_cp.pipeline.offload import Offload, balanced, under
from megatron_cp.pipeline.passes import check, without_moves
from megatron_cp.pipeline.placement import ONE_PIPE, PLACEMENTS, Placement
from megatron_cp.pipeline.schedule import PEER, BadSchedule, Schedule
from megatron_cp.pipeline.schedules.auto import auto, unmoved
from megatron_cp.pipeline.schedules.pipedream import USUAL, StepOfRun
from megatron_cp.pipeline.simulate import SimulatedStep, peaks, simulate
from megatron_cp.pipeline.vocabulary import Vocabulary, check_barriers, shared_out
from megatron_cp.pipeline.vocabulary_order import with_vocabulary
from megatron_cp.registry import suggest


def place(rule: Rule, p: int, v: int | None = None, placement: str | None = None) -> Placement:
    """Return where `rule` puts its stages; `v` and `placement` default to what the rule implies.

    Raises ValueError for p < 2, for a v or placement that the rule does not support, and for an odd p on two pipes.
    """
    if p < 2:
        raise Refused(f"a pipeline needs at least 2 ranks, got p = {p}")
    name = placement or rule.placement
    known = PLACEMENTS if rule.table else ONE_PIPE
    if name not in known:
        raise Refused(f"unknown placement {name!r}{suggest(name, known)}; known: {', '.join(known)}")
    if name != rule.placement and rule.table is not None:
        raise Refused(
            f"{rule.name} is a rule of placement {rule.placement!r}, got {name!r}; auto knows {' and '.join(ONE_PIPE)}"
        )
    chunks = v if v is not None else max(rule.usual, 2 if name == "v" else 1)
    if chunks < 1:
        raise Refused(f"a rank holds at least one chunk, got v = {chunks}")
    if rule.chunks not in (None, chunks):
        raise Refused(f"{rule.name} has v = {rule.chunks}, got v = {chunks}; leave it out or take {kin(rule, chunks)}")
    return PLACEMENTS[name](p, chunks)


def kin(rule: Rule, v: int) -> str:
    """Return the schedules of the same placement that have v chunks per rank, as a text."""
    kin = [other.name for other in SCHEDULES if other.placement == rule.placement and other.chunks in (None, v)]
    return " or ".join(kin) if kin else "auto"


def build(
    name: str,
    p: int,
    m: int,
    v: int | None = None,
    *,
    warmup: float | None = None,
    overlapped: bool = False,
    placement: str | None = None,
    costs: Costs | None = None,
    caps: Sequence[float] | None = None,
    objective: str = "makespan",
    moves: Offload | None = None,
    slices: int = 1,
    step: StepOfRun = USUAL,
    barriers: int = 0,
) -> Schedule:
    """Return the checked table of a schedule.

    p, m, v:    ranks, microbatches, chunks per rank (None: what the schedule implies)
    warmup:     warm-up multiplier, for rules that take one
    overlapped: write forwards and backwards that run at the same time as one action, for rules that have some
    placement:  loop or v, for `auto`
    costs:      times and memory of every stage; `auto` needs them, and caps mean nothing without them
    caps:       most memory of each rank, in M_B
    objective:  makespan or span, for `auto`
    moves:      limit of chunks per rank, and where activations beyond it go; caps then hold for what is left
    slices:     parts of every sequence that run like microbatches, each backward after those of later parts
    barriers:   of every microbatch, 1 or 2, where the LM head lies on all ranks; 0 if it lies on the last one
    step:       of a run, for rules whose steps end without a flush
    Raises ValueError for an unknown name, for sizes the rule does not know, for a cap below the minimum, and, naming
    the nearest m that works, where a rule's table is incomplete or its ranks would wait for each other.
    """
    rule = SCHEDULES.get(name)
    where = place(rule, p, v, placement)
    if costs is not None and len(costs.forward) != len(where.rank_of):
        raise Refused(f"costs of {len(costs.forward)} stages do not fit {rule.name}, which has {len(where.rank_of)}")
    if m < 1:
        raise Refused(f"a step needs at least one microbatch, got m = {m}")
    if warmup is not None and not rule.takes_warmup:
        raise Refused(f"{rule.name} has no warm-up multiplier; izb has")
    if overlapped and not rule.overlaps:
        known = ", ".join(other.name for other in SCHEDULES if other.overlaps)
        raise Refused(f"{rule.name} overlaps no forward with a backward; take {known}")
    check_slices(rule, slices)
    if barriers:
        check_vocabulary(rule, barriers, slices, moves, overlapped)
        schedule = _with_vocabulary(rule, where, m, warmup, barriers, costs)
        if costs is not None and caps is not None:
            check_caps(schedule, costs, caps)
        return schedule
    if rule.table is None:
        if costs is None:
            raise Refused(f"{rule.name} schedules from times; give it costs")
        return check(auto(where, m, costs, caps, objective, moves))
    if rule.lends:
        moves = lent(rule, where.ranks, moves)
    if rule.delay and moves is not None:
        raise Refused(
            f"{rule.name} keeps activations from one step to the next, where no limit of chunks moves them; leave "
            "--pp-offload out, or take it with 1f1b"
        )
    schedule = _fixed(rule, where, m, warmup, overlapped, slices, step)
    if moves is not None:
        schedule = check(under(schedule, moves, costs, caps))
    if costs is not None and caps is not None:
        check_caps(schedule, costs, caps)
    return schedule


def check_slices(rule: Rule, slices: int) -> None:
    """Raise ValueError for a number of slices that is none, or a rule whose order knows no slices."""
    if slices < 1:
        raise Refused(f"a sequence is cut into 1 slice or more, got {slices}")
    if slices > 1 and not rule.takes_slices:
        known = ", ".join(other.name for other in SCHEDULES if other.takes_slices)
        raise Refused(f"{rule.name} has no order for {slices} slices of a sequence; take one of {known}")


def check_vocabulary(
    rule: Rule, barriers: int, slices: int = 1, moves: Offload | None = None, overlapped: bool = False
) -> None:
    """Raise ValueError where a rule has no place for a vocabulary over all ranks, or it comes with another order."""
    check_barriers(barriers)
    if rule.no_vocabulary:
        raise Refused(
            f"{rule.name} has no place for a vocabulary over all ranks, for it {rule.no_vocabulary}; take 1f1b, "
            "interleaved or zb-v"
        )
    if overlapped:
        raise Refused("a vocabulary over all ranks has no place beside forwards that overlap backwards; leave one out")
    if slices > 1:
        raise Refused(
            f"a vocabulary over all ranks takes whole sequences, got {slices} slices; leave one of the two out"
        )
    if moves is not None:
        raise Refused(
            f"a vocabulary over all ranks keeps activations where they are, got a limit of {moves.limit} chunks; leave "
            "one out"
        )


def _with_vocabulary(
    rule: Rule, where: Placement, m: int, warmup: float | None, barriers: int, costs: Costs | None
) -> Schedule:
    if rule.own_vocabulary:
        return _fixed(rule, where, m, warmup, vocabulary=shared_out(barriers, where, costs))
    return check(with_vocabulary(lambda micros: _fixed(rule, where, micros, warmup), m, barriers, costs))


def lent(rule: Rule, p: int, moves: Offload | None) -> Offload:
    """Return the limit that a rule with lenders brings; raises ValueError for another one beside it."""
    own = Offload(balanced(p), PEER)
    if moves is not None:
        raise Refused(
            f"{rule.name} has a limit of its own, {own.limit} chunks with the others on the peer, got {moves.limit} on "
            f"the {moves.to}; leave --pp-offload out, or take it with 1f1b"
        )
    return own


def price_of_moves(run: SimulatedStep, caps: Sequence[float] | None = None, time: str = "") -> str:
    """Return in words how long a move takes, and makespan and peak with moves and without.

    caps: per rank, in M_B, to which `auto` keeps without moves too
    time: the unit of times
    """
    schedule, costs, unit = run.schedule, run.costs, f" {time}" if time else ""
    fullest = max(schedule.placement.of_rank, key=lambda stages: sum(costs.kept[stage] for stage in stages))
    forward = sum(costs.forward[stage] for stage in fullest)
    plain = _without_moves(run, caps)
    of_both = [
        f"{one.makespan:.5g}{unit} at {max(one.peak):.3g} M_B" if one else "no table fits" for one in (run, plain)
    ]
    return f"moving M_B takes {costs.move / forward:.3g} T_F, makespan {' with moves, '.join(of_both)} without"


def _without_moves(run: SimulatedStep, caps: Sequence[float] | None) -> SimulatedStep | None:
    schedule = run.schedule
    # a table in a file has a name of its own
    if schedule.name not in SCHEDULES.names or SCHEDULES.get(schedule.name).table is not None:
        return simulate(without_moves(schedule), run.costs)
    try:
        found = unmoved(schedule.placement, schedule.micros, run.costs, tuple(caps) if caps else None, "makespan")
    except Refused:
        return None
    return simulate(found, run.costs)


def check_caps(schedule: Schedule, costs: Costs, caps: Sequence[float]) -> None:
    """Raise ValueError where a rank of `schedule` needs more memory than its cap, both in M_B."""
    most = peaks(schedule, costs)
    worst = max(range(len(most)), key=lambda rank: most[rank] - caps[rank])
    if most[worst] > caps[worst] + EPSILON:
        minimum = f"{most[worst]:g} M_B of {schedule.name}, on rank {worst}"
        raise Refused(f"a cap of {caps[worst]:g} M_B is below the minimum {minimum}")


def _fixed(
    rule: Rule,
    placement: Placement,
    m: int,
    warmup: float | None,
    overlapped: bool = False,
    slices: int = 1,
    step: StepOfRun = USUAL,
    vocabulary: Vocabulary | None = None,
) -> Schedule:
    try:
        return _table(rule, placement, m, warmup, overlapped, slices, step, vocabulary)
    except BadSchedule as bad:
        sizes = f"p = {placement.ranks}, m = {m}, v = {placement.chunks}"
        reason = f"has no valid table for {sizes}{_way_out(rule, placement, m, warmup)}; {bad.reason}"
        raise BadSchedule(bad.schedule, reason, bad.failing) from None


def _table(
    rule: Rule,
    placement: Placement,
    m: int,
    warmup: float | None,
    overlapped: bool = False,
    slices: int = 1,
    step: StepOfRun = USUAL,
    vocabulary: Vocabulary | None = None,
) -> Schedule:
    before, after = rule.delay(placement.ranks, m).ends(m, step) if rule.delay else ((), ())
    table = rule.make(placement.ranks, m, placement.chunks, warmup, overlapped, slices, step, vocabulary)
    return check(
        Schedule(
            rule.name,
            placement,
            m * slices,
            table,
            slices=slices,
            before=before,
            after=after,
            barriers=vocabulary.barriers if vocabulary else 0,
        )
    )


def _way_out(rule: Rule, placement: Placement, m: int, warmup: float | None) -> str:
    works = next((near for near in _nearest(m, placement.ranks) if _works(rule, placement, near, warmup)), None)
    return f"; the nearest m that works is {works}" if works else ""


def _nearest(m: int, p: int) -> Iterator[int]:
    """Yield other numbers of microbatches, the nearest first."""
    for distance in range(1, max(m, 2 * p) + 1):
        if m > distance:
            yield m - distance
        yield m + distance


def _works(rule: Rule, placement: Placement, m: int, warmup: float | None) -> bool:
    try:
        _table(rule, placement, m, warmup)
    except Refused:
        return False
    return True
