"""Schedules played by name, and the published profiles."""

from collections.abc import Sequence

from megatron_cp.pipeline import SCHEDULES
from megatron_cp.pipeline.build import build
from megatron_cp.pipeline.costs import uniform
from megatron_cp.pipeline.schedule import Schedule
from megatron_cp.pipeline.simulate import SimulatedStep, simulate

UNIT = (1.0, 1.0, 1.0, 0.0)

# arXiv:2401.10241, table 8: model, p, m -> T_F, T_B, T_W, T_comm in ms
PROFILES = {
    ("1.5B", 8, 24): (18.522, 18.086, 9.337, 0.601),
    ("1.5B", 8, 32): (18.513, 18.086, 9.331, 0.626),
    ("1.5B", 8, 64): (18.546, 18.097, 9.321, 0.762),
    ("6.2B", 8, 24): (29.718, 29.444, 19.927, 0.527),
    ("6.2B", 8, 32): (29.802, 29.428, 19.530, 0.577),
    ("6.2B", 8, 64): (29.935, 29.621, 19.388, 0.535),
}
RATIOS = {
    "1:1:1": (1.0, 1.0, 1.0, 0.0),
    "1:.98:.66": (1.0, 0.98, 0.66, 0.0),
    "1:1.3:.7": (1.0, 1.3, 0.7, 0.0),
    "1:2:.5": (1.0, 2.0, 0.5, 0.0),
    "3:5:1": (3.0, 5.0, 1.0, 0.0),
}


def played(
    name: str, p: int, m: int, times: Sequence[float] = UNIT, memory: Sequence[float] = (1.0, 1.0)
) -> SimulatedStep:
    """A step of `name`, written as rule, rule:v or rule:v:warmup."""
    schedule = scheduled(name, p, m)
    return simulate(schedule, uniform(schedule.placement, times, memory))


def scheduled(name: str, p: int, m: int) -> Schedule:
    rule, *rest = name.split(":")
    return build(rule, p, m, int(rest[0]) if rest else None, warmup=float(rest[1]) if rest[1:] else None)


def chunk_units(name: str, p: int, m: int) -> tuple[float, float]:
    """(makespan beyond the ideal, peak), both counted in chunks, with all passes taking one chunk time."""
    run = played(name, p, m)
    v = run.schedule.placement.chunks
    return round((run.makespan - 3 * m) * v, 9), round(max(run.peak) * v, 9)


# those that move activations are built from these, and others of other steps: all have tests of their own
FIXED = [rule.name for rule in SCHEDULES if rule.table and not (rule.lends or rule.delay or rule.two_copies)]
