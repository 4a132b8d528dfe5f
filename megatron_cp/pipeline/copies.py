"""Two copies of the model on the ranks of one pipeline: when their gradients have been added up."""

from collections.abc import Sequence

from megatron_cp.pipeline.action import FULL, WEIGHT, halves
from megatron_cp.pipeline.costs import Costs
from megatron_cp.pipeline.schedule import Schedule


def added_up(schedule: Schedule, costs: Costs, ends: Sequence[Sequence[float]]) -> float:
    """Return when the gradients of every part of the model have been added up over its copies.

    ends: per rank, of each cell of the table
    A sum begins when all copies have their last gradient and none of their ranks adds up another part. It takes
    `costs.sync` and runs beside what the ranks compute.
    """
    where = schedule.placement
    ready = [0.0] * where.length
    for cells, times in zip(schedule.table, ends, strict=True):
        for cell, end in zip(cells, times, strict=True):
            for part in {action.stage % where.length for action in halves(cell) if action.kind in (FULL, WEIGHT)}:
                ready[part] = max(ready[part], end)
    free = [0.0] * where.ranks
    for time, part in sorted(zip(ready, range(where.length), strict=True)):
        ranks = where.rank_of[part :: where.length]
        end = max(time, *(free[rank] for rank in ranks)) + costs.sync
        for rank in ranks:
            free[rank] = end
    return max(free)
