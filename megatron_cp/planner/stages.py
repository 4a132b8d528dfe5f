"""Layers, seconds and kept activations of the pipeline stages of a run."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from megatron_cp.pipeline import SCHEDULES
from megatron_cp.pipeline.build import place
from megatron_cp.pipeline.placement import Placement
from megatron_cp.planner.copies import lent_times
from megatron_cp.planner.memory import mean_layer_bytes
from megatron_cp.planner.parallel import Parallel
from megatron_cp.planner.vocabulary import end_times
from megatron_cp.planner.work import PassTimes, RankConfig, ends, layer, layer_kinds, mtp, recomputed


class Stage(NamedTuple):
    """A pipeline stage, or all stages of a rank.

    layers: number of its layers, with those of the second copy where ranks have two
    work:   times of one microbatch, a mean over the copies
    kept:   bytes that it keeps of a microbatch from forward to backward
    """

    layers: float
    work: PassTimes
    kept: float

    @property
    def seconds(self) -> float:
        return sum(part.total for part in self.work)

    def __add__(self, other: "Stage") -> "Stage":  # type: ignore[override]
        return Stage(self.layers + other.layers, self.work.plus(other.work), self.kept + other.kept)


def stages_of(rank: RankConfig) -> list[Stage]:
    """Return the stages of a pipeline in order, with embedding, output layer and multi-token prediction at the ends."""
    parallel, model = rank.parallel, rank.model
    count = parallel.pp * parallel.vp
    slots = (model.layers + (2 if parallel.balanced_ends else 0)) // count
    layers = [slots - (parallel.balanced_ends and at in (0, count - 1)) for at in range(count)]
    if count == 1:
        layers = [model.layers]
    layers = list(parallel.layout or layers)
    layers[-1] += model.mtp
    one = mean_layer(rank)
    each = {count: _stage(rank, one, count) for count in set(layers)}
    stages = [each[count] for count in layers]
    first, last = ends(rank)
    if parallel.barriers:
        every, first, last = end_times(rank)
        stages = [stage._replace(work=stage.work.plus(every)) for stage in stages]
    stages[0] = stages[0]._replace(work=stages[0].work.plus(first))
    end = stages[-1].work.plus(last)
    stages[-1] = stages[-1]._replace(work=end.plus(mtp(rank), model.mtp) if model.mtp else end)
    return stages * parallel.copies


def _stage(rank: RankConfig, one: PassTimes, layers: int) -> Stage:
    """Return a stage of so many layers, of which those that "full" recomputes run forward once more in backward.

    Kept attention is left out of that.
    """
    again = recomputed_layers(rank, layers)
    repeated = one.forward if rank.parallel.attends_again else one.forward._replace(attention=0.0, context=0.0)
    work = PassTimes().plus(one, layers).plus(PassTimes(input=repeated), again)
    work = work.plus(lent_times(rank, one, layers, again))
    kept = again * mean_layer_bytes(rank)
    if again < layers:
        kept += (layers - again) * mean_layer_bytes(replace(rank, parallel=plain(rank.parallel)))
    return Stage(layers, work, kept)


def mean_layer(rank: RankConfig) -> PassTimes:
    """Return the mean over dense and mixture layers, with the modules that backward recomputes."""
    work = PassTimes()
    for one, moe, share in layer_kinds(rank):
        work = work.plus(layer(one, moe).plus(PassTimes(input=recomputed(one, moe))), share)
    return work


def recomputed_layers(rank: RankConfig, layers: float) -> float:
    """Return the layers of a stage that are recomputed whole."""
    parallel = rank.parallel
    if parallel.recompute != "full":
        return 0
    return min(layers, parallel.recompute_layers) if parallel.recompute_method == "block" else layers


def plain(parallel: Parallel) -> Parallel:
    """Return the same run without recomputation of whole layers."""
    return replace(parallel, recompute="none") if parallel.recompute == "full" else parallel


def of_ranks(rank: RankConfig, stages: Sequence[Stage]) -> list[Stage]:
    """Return the stages of each pipeline rank, added up."""
    parallel = rank.parallel
    if parallel.pp == 1:
        return [stages[0]]
    placed, share = placement_of(parallel).of_rank, 1 / parallel.copies
    whole = [sum((stages[at] for at in mine), start=Stage(0.0, PassTimes(), 0.0)) for mine in placed]
    return [stage._replace(work=PassTimes().plus(stage.work, share)) for stage in whole]


def placement_of(parallel: Parallel) -> Placement:
    """Return which stages each pipeline rank holds."""
    return place(SCHEDULES.get(parallel.schedule_name), parallel.pp, parallel.vp, parallel.pp_placement)


def holds_ends(parallel: Parallel, at: int) -> tuple[bool, bool]:
    """Return True where a pipeline rank holds an embedding, and where it holds an output layer."""
    if parallel.pp == 1:
        return True, True
    ranks = placement_of(parallel).rank_of
    first, last = at == ranks[0], at == ranks[-1]
    if parallel.copies > 1:
        last = at == parallel.pp - 1
    # the second copy begins where the first one ends
    return (first, last) if parallel.copies == 1 else (first or last, first or last)


def slowest_stage(rank: RankConfig) -> Stage:
    """Return the stages of the pipeline rank whose microbatch takes longest."""
    return max(of_ranks(rank, stages_of(rank)), key=lambda stage: stage.seconds)
