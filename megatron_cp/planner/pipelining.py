"""Seconds and memory of a step's microbatches, by simulation of the pipeline's schedule."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from megatron_cp.pipeline import SCHEDULES
from megatron_cp.pipeline.build import build
from megatron_cp.pipeline.costs import Costs
from megatron_cp.pipeline.offload import Offload
from megatron_cp.pipeline.schedule import PEER, Schedule
from megatron_cp.pipeline.simulate import peaks, simulate
from megatron_cp.pipeline.slices import AttentionShares, SliceShare, shares
from megatron_cp.pipeline.steady import free_step
from megatron_cp.pipeline.vocabulary import returned_before
from megatron_cp.planner.memory import MemoryUse, keys_for_slices, rank_memory, slice_lengths
from megatron_cp.planner.parallel import Parallel
from megatron_cp.planner.stages import Stage, holds_ends, of_ranks, recomputed_layers
from megatron_cp.planner.vocabulary import embedding_seconds, head_times, meeting_times
from megatron_cp.planner.work import PassTimes, RankConfig

LONG = 3
"""Microbatches per pipeline rank that are simulated; each further one adds the slowest rank's work, in two pipes, and
with a vocabulary on all ranks, as much as each of p more adds."""


def makespan(rank: RankConfig, stages: Sequence[Stage]) -> float:
    """Return the seconds of a step's microbatches."""
    parallel = rank.parallel
    if parallel.pp == 1:
        return parallel.micros * stages[0].seconds
    schedule, costs = _played(rank, stages)
    seconds, more = simulate(schedule, costs).objective(parallel.objective), parallel.micros - schedule.sequences
    if parallel.free_running:
        seconds = free_step(schedule, costs)
    if more and (parallel.copies > 1 or parallel.barriers):
        # where two pipes get in each other's way, or all ranks meet, they wait again for every p microbatches
        longer = simulate(_schedule(parallel, schedule.sequences + parallel.pp, costs), costs)
        seconds += more * (longer.objective(parallel.objective) - seconds) / parallel.pp
    else:
        seconds += more * max(costs.work(schedule.placement))
    if parallel.barriers:
        seconds += embedding_seconds(rank, len(returned_before(schedule.table[0])[None]))
    return seconds


def memory_of(rank: RankConfig, stages: Sequence[Stage]) -> tuple[MemoryUse, ...]:
    """Return the memory of each pipeline rank."""
    last = rank.parallel.pp - 1
    if last == 0:
        kept = [stages[0].kept]
    else:
        schedule, costs = _played(rank, stages)
        kept = list(peaks(schedule, costs))
        if rank.parallel.slices > 1 and rank.parallel.moves:
            kept = _kept_beside_keys(rank, stages, schedule, costs)
    versions = _versions(rank)
    return tuple(
        rank_memory(rank, stage.layers, most, *holds_ends(rank.parallel, at), versions[at])
        for at, (stage, most) in enumerate(zip(of_ranks(rank, stages), kept, strict=True))
    )


def _versions(rank: RankConfig) -> Sequence[int]:
    """Return how many versions of its weights each pipeline rank keeps."""
    p, delay = rank.parallel.pp, SCHEDULES.get(rank.parallel.schedule_name).delay
    return delay(p, rank.parallel.micros).versions if delay and p > 1 else (1,) * p


def _kept_beside_keys(rank: RankConfig, stages: Sequence[Stage], schedule: Schedule, costs: Costs) -> list[float]:
    """Return an upper bound of the bytes of each rank where all but keys and values moves: later slices need those."""
    keys = tuple(stage.layers * keys_for_slices(rank, rank.parallel.bytes) for stage in stages)
    moving = replace(
        costs,
        kept=tuple(size - of_keys for size, of_keys in zip(costs.kept, keys, strict=True)),
        held=tuple(max(0.0, size - of_keys) for size, of_keys in zip(costs.held, keys, strict=True)),
    )
    staying = replace(costs, kept=keys, held=(0.0,) * len(keys))
    whole = replace(rank, parallel=replace(rank.parallel, moves=None))
    of_moving, of_staying = peaks(schedule, moving), peaks(_played(whole, stages)[0], staying)
    return [sum(parts) for parts in zip(of_moving, of_staying, strict=True)]


def _played(rank: RankConfig, stages: Sequence[Stage]) -> tuple[Schedule, Costs]:
    parallel = rank.parallel
    p, m, costs = parallel.pp, parallel.micros, _costs(rank, stages)
    few = m if m <= LONG * p else LONG * p - p + m % p
    return _schedule(parallel, few, costs), costs


def _schedule(parallel: Parallel, m: int, costs: Costs) -> Schedule:
    name, p, v, moves = parallel.schedule_name, parallel.pp, parallel.vp, parallel.moves
    if parallel.barriers:
        return build(name, p, m, v, costs=costs, barriers=parallel.barriers)
    if SCHEDULES.get(name).table:
        return _table(name, p, m, v, moves, parallel.slices)
    return build(name, p, m, v, placement=parallel.pp_placement, costs=costs, moves=moves)


@lru_cache(256)
def _table(name: str, p: int, m: int, v: int, moves: Offload | None, slices: int) -> Schedule:
    return build(name, p, m, v, moves=moves, slices=slices)


def _costs(rank: RankConfig, stages: Sequence[Stage]) -> Costs:
    parallel, cluster = rank.parallel, rank.cluster
    stride = parallel.world // parallel.pp
    hop = cluster.link(0, stride).hop_seconds(rank.split_tokens / parallel.slices * rank.model.hidden * parallel.bytes)
    waited, hop = (hop, 0.0) if parallel.schedule_name == "interleaved" and not parallel.overlap_p2p else (0.0, hop)
    sizes = tuple(max(1.0, stage.kept) for stage in stages)
    # a stage of the embedding alone has no input gradient, but the simulator needs positive times
    times = ([max(part.total, 1e-9) for part in stage.work] for stage in stages)
    forward, backward, weight = (tuple(column) for column in zip(*times, strict=True))
    forward, backward = (tuple(seconds + waited for seconds in column) for column in (forward, backward))
    # the inputs of norms are needed for the input gradient only
    held = tuple(
        size - 2 * size_of_norms(rank) * (stage.layers - recomputed_layers(rank, int(stage.layers)))
        for size, stage in zip(sizes, stages, strict=True)
    )
    logits, logits_back = head_times(rank)
    return Costs(
        forward=forward,
        input=backward,
        weight=weight,
        comm=hop,
        kept=sizes,
        held=held,
        unit=1.0,
        move=_move_seconds(rank),
        slices=_slices(rank, stages),
        head=(logits.total, logits_back.total),
        meeting=meeting_times(rank) if parallel.barriers else None,
    )


def _slices(rank: RankConfig, stages: Sequence[Stage]) -> tuple[SliceShare, ...]:
    """Return the part of each slice in the work and the activations of a sequence; nothing for whole sequences."""
    lengths = slice_lengths(rank)
    if len(lengths) == 1:
        return ()
    work = sum(stages, start=Stage(0.0, PassTimes(), 0.0)).work
    forward, backward, _ = ((part.attention + part.context) / part.total if part.total else 0.0 for part in work)
    return shares(lengths, AttentionShares(forward, backward))


def _move_seconds(rank: RankConfig) -> float:
    """Return the seconds in which a byte of activations moves to the host, or to the peer, and 0 where none moves."""
    parallel, cluster = rank.parallel, rank.cluster
    lends = SCHEDULES.get(parallel.schedule_name).lends
    if parallel.moves is None and not lends:
        return 0.0
    if lends or (parallel.moves and parallel.moves.to == PEER):
        # the ranks at the ends of the pipeline lie farthest apart
        size = 1e6
        return cluster.link(0, parallel.world - parallel.world // parallel.pp).hop_seconds(size) / size
    # without memory of its own a device copies within the host's
    return 1 / (cluster.host_bytes_per_s or cluster.touch_bytes_per_s / 2)


def size_of_norms(rank: RankConfig) -> float:
    """Return the bytes of the input of one norm in one layer."""
    return rank.split_tokens * rank.model.hidden * rank.parallel.bytes
