"""From a schedule's name and the user's sizes to a checked table, or to the reason why there is none."""

from collections.abc import Iterator

from megatron_cp.pipeline import SCHEDULES, Rule
from megatron_cp.pipeline.passes import check
from megatron_cp.pipeline.placement import PLACEMENTS, Placement
from megatron_cp.pipeline.schedule import BadSchedule, Schedule


def place(rule: Rule, p: int, v: int | None = None, placement: str | None = None) -> Placement:
    """Where `rule` puts its stages; `v` and `placement` default to what the rule implies.

    Raises ValueError for p < 2 and for a v or placement that the rule does not know.
    """
    if p < 2:
        raise ValueError(f"a pipeline needs at least 2 ranks, got p = {p}")
    chunks = v if v is not None else rule.usual
    if chunks < 1:
        raise ValueError(f"a rank holds at least one chunk, got v = {chunks}")
    if rule.chunks not in (None, chunks):
        raise ValueError(f"{rule.name} has v = {rule.chunks}, got v = {chunks}; leave it out or take {_kin(rule, chunks)}")
    if placement not in (None, rule.placement) and rule.table is not None:
        raise ValueError(f"{rule.name} has placement {rule.placement!r}, got {placement!r}")
    name = placement or rule.placement
    if name not in PLACEMENTS:
        raise ValueError(f"unknown placement {name!r}; known: {', '.join(PLACEMENTS)}")
    return PLACEMENTS[name](p, chunks)


def _kin(rule: Rule, v: int) -> str:
    kin = [other.name for other in SCHEDULES if other.placement == rule.placement and other.chunks in (None, v)]
    return " or ".join(kin) if kin else "auto"


def fixed(name: str, p: int, m: int, v: int | None = None, warmup: float | None = None) -> Schedule:
    """The checked table of a fixed rule.

    p, m, v: ranks, microbatches, chunks per rank
    warmup:  warm-up multiplier, for rules that take one
    Raises ValueError for an unknown name, for a v the rule does not know, and, naming the nearest m that works, where
    the rule's table for these sizes is incomplete or its ranks would wait for each other.
    """
    rule = SCHEDULES.get(name)
    placement = place(rule, p, v)
    if rule.table is None:
        raise ValueError(f"{name} is no fixed rule; give it times")
    if m < 1:
        raise ValueError(f"a step needs at least one microbatch, got m = {m}")
    if warmup is not None and not rule.takes_warmup:
        raise ValueError(f"{name} has no warm-up multiplier; izb has")
    try:
        return _table(rule, placement, m, warmup)
    except BadSchedule as bad:
        sizes = f"p = {p}, m = {m}, v = {placement.chunks}"
        raise BadSchedule(
            bad.schedule, f"has no valid table for {sizes}{_way_out(rule, placement, m, warmup)}; {bad.reason}", bad.failing
        ) from None


def _table(rule: Rule, placement: Placement, m: int, warmup: float | None) -> Schedule:
    table = rule.make(placement.ranks, m, placement.chunks, warmup)
    return check(Schedule(rule.name, placement, m, table))


def _way_out(rule: Rule, placement: Placement, m: int, warmup: float | None) -> str:
    works = next((near for near in _nearest(m, placement.ranks) if _works(rule, placement, near, warmup)), None)
    return f"; the nearest m that works is {works}" if works else ""


def _nearest(m: int, p: int) -> Iterator[int]:
    """Other numbers of microbatches, the nearest first."""
    for distance in range(1, max(m, 2 * p) + 1):
        if m > distance:
            yield m - distance
        yield m + distance


def _works(rule: Rule, placement: Placement, m: int, warmup: float | None) -> bool:
    try:
        _table(rule, placement, m, warmup)
    except BadSchedule:
        return False
    return True
