"""Time of a step without a flush where no rank waits for another one's update.

Such a run is one endless 1F1B: rank r begins forward i + p - r once its backward i has ended, and backward i once its
forward i + p - 1 - r has. A chain of waits goes up from a rank r to a rank s through forwards and down again through
backwards, and is then s - r + 1 microbatches further. The slowest chain sets the pace.
"""

from itertools import accumulate

from megatron_cp.errors import Refused
from megatron_cp.pipeline import SCHEDULES
from megatron_cp.pipeline.costs import Costs
from megatron_cp.pipeline.schedule import Schedule

FLAG = "--pp-free-running"


def free_step(schedule: Schedule, costs: Costs) -> float:
    """Return how long each step of such a run takes, in the unit of `costs`, after the first few.

    schedule: of a step between others, by a rule without a flush
    """
    done = [0.0, *accumulate(costs.work(schedule.placement))]
    ranks = range(schedule.placement.ranks)
    chains = ((done[s + 1] - done[r] + 2 * costs.comm * (s - r)) / (s - r + 1) for r in ranks for s in ranks[r:])
    return schedule.sequences * max(chains)


def check_free(schedule: str | None) -> None:
    """Raise ValueError where ranks cannot run freely, for steps of this schedule end with a flush."""
    known = " or ".join(rule.name for rule in SCHEDULES if rule.delay)
    if schedule is None:
        raise Refused(f"{FLAG} needs --pp-schedule {known}, got none; add one, or leave {FLAG} out")
    if SCHEDULES.get(schedule).delay is None:
        raise Refused(
            f"{FLAG} needs steps without a flush, got --pp-schedule {schedule}; take {known}, or leave {FLAG} out"
        )
