"""Bounds of all schedules: the shortest makespan, and the least memory of a step."""

from collections import defaultdict
from collections.abc import Sequence
from math import inf

from megatron_cp.pipeline.costs import Costs
from megatron_cp.pipeline.placement import Placement
from megatron_cp.pipeline.schedule import Schedule
from megatron_cp.pipeline.simulate import hops


def least_memory(placement: Placement, costs: Costs) -> float:
    """Return the smallest cap, in M_B, under which a step can end: one microbatch in all chunks of the fullest rank."""
    kept: dict[tuple[int, int], list[float]] = defaultdict(list)
    for stage, rank in enumerate(placement.rank_of):
        kept[placement.pipe_of(stage), rank].append(costs.kept[stage])
    return max(map(sum, kept.values())) / costs.unit


def bound_of(schedule: Schedule, costs: Costs, caps: Sequence[float] | None = None) -> float:
    """Return a makespan that no order of the same step can beat, with memory caps per rank in M_B.

    Where forwards of this step ran in the one before, that is the longest work of a rank.
    """
    if any(schedule.before):
        return schedule.sequences * max(costs.work(schedule.placement))
    return lower_bound(schedule.placement, schedule.sequences, costs, caps)


def lower_bound(placement: Placement, m: int, costs: Costs, caps: Sequence[float] | None = None) -> float:
    """Return a makespan that no order of actions on `placement` can beat, with memory caps per rank in M_B.

    Every rank starts when the first microbatch reaches it, and must stand idle as long as its cap admits no further
    forward and the first input gradient has not come back; it has all of its work to do, of which overlaps hide no more
    than the share `costs.hidden` of its forwards or backwards.
    """
    arrivals = _first_arrivals(placement, costs)
    returns = _first_returns(placement, costs, arrivals)
    bounds = []
    for rank, (stages, work) in enumerate(zip(placement.of_rank, costs.work(placement), strict=True)):
        start = min(arrivals[stage] for stage in stages)
        back = min(returns[stage] for stage in stages)
        budget = (caps[rank] if caps else inf) * costs.unit
        if costs.hidden:
            forward = sum(costs.forward[stage] for stage in stages) / placement.pipes
            work -= costs.hidden * min(forward, work - forward)
        # S and T keep nothing, and need no gradient
        filled = _forward_time(stages, m // placement.pipes, costs, budget) + m * sum(costs.head)
        bounds.append(start + m * work + max(0.0, back - start - filled))
    return max(bounds)


def _first_arrivals(placement: Placement, costs: Costs) -> list[float]:
    """Return when each stage can start its first forward."""
    forward_hops, _ = hops(placement, costs)
    part = costs.slices[0].forward if costs.slices else 1.0
    arrivals: list[float] = []
    for stage in range(len(placement.rank_of)):
        before = stage - 1
        way = costs.forward[before] * part + forward_hops[before]
        arrivals.append(0.0 if placement.first(stage) else arrivals[before] + way)
    return arrivals


def _first_returns(placement: Placement, costs: Costs, arrivals: Sequence[float]) -> list[float]:
    """Return when each stage can start its first input gradient, from the arrivals of the first forwards."""
    _, backward_hops = hops(placement, costs)
    part = costs.slices[-1].input if costs.slices else 1.0
    returns = list(arrivals)
    for stage in reversed(range(len(returns))):
        if placement.last(stage):
            # the last stage has all slices of a sequence before the first of them comes back
            returns[stage] += costs.forward[stage]
        else:
            after = stage + 1
            returns[stage] = returns[after] + (costs.input[after] * part + backward_hops[after])
    return returns


def _forward_time(stages: Sequence[int], m: int, costs: Costs, budget: float) -> float:
    """Return the most forward time that fits in a memory budget before anything is freed: longest per memory first."""
    total = 0.0
    for stage in sorted(stages, key=lambda stage: costs.forward[stage] / costs.kept[stage], reverse=True):
        count = min(m, budget / costs.kept[stage])
        total += count * costs.forward[stage]
        budget -= count * costs.kept[stage]
    return total
