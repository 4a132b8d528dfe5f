"""Estimate a training step on a cluster before it is run: seconds by kind, memory, traffic, MFU."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from megatron_cp.context import BACKENDS
from megatron_cp.context.checks import check_latent
from megatron_cp.context.choose import Record
from megatron_cp.errors import Refused
from megatron_cp.hardware.cluster import Cluster
from megatron_cp.pipeline import SCHEDULES
from megatron_cp.pipeline.build import build, check_slices, check_vocabulary, place
from megatron_cp.pipeline.costs import Costs
from megatron_cp.pipeline.offload import Offload
from megatron_cp.pipeline.placement import Placement
from megatron_cp.pipeline.schedule import PEER, Schedule
from megatron_cp.pipeline.simulate import peaks, simulate
from megatron_cp.pipeline.slices import AttentionShares, SliceShare, shares
from megatron_cp.pipeline.vocabulary import returned_before
from megatron_cp.planner.memory import (
    BUCKET,
    MemoryUse,
    keys_for_slices,
    kinds_of,
    mean_layer_bytes,
    moved_in_a_step,
    of_shards,
    parameter_bytes,
    rank_memory,
    slice_lengths,
    stage_parameters,
)
from megatron_cp.planner.model import Transformer
from megatron_cp.planner.parallel import Parallel
from megatron_cp.planner.quantised import ParameterKinds, gather_seconds, reduce_seconds
from megatron_cp.planner.tiers import on_disk_seconds
from megatron_cp.planner.traffic import AVERAGED_BYTES, StepTraffic, step_traffic, to_peer
from megatron_cp.planner.vocabulary import embedding_seconds, end_times, head_times, meeting_times
from megatron_cp.planner.work import (
    PassTimes,
    RankConfig,
    Seconds,
    collective_seconds,
    ends,
    layer,
    layer_kinds,
    mtp,
    placed,
    recomputed,
)


class Parts(NamedTuple):
    """Seconds of a step on its slowest pipeline rank, by kind; the first five as in `Seconds`.

    pipeline:  idle, or waiting for other pipeline ranks
    data:      reduction of gradients and gathering of weights that no computation hides
    optimizer: its passes over memory and over its state in files, and the time of a step beside its work on tensors
    """

    products: float
    attention: float
    memory: float
    context: float
    collectives: float
    pipeline: float
    data: float
    optimizer: float

    @property
    def total(self) -> float:
        return sum(self)


IN_WORDS = {
    "products": "matrix products",
    "attention": "attention kernels",
    "memory": "passes over memory",
    "context": "copies and waits of context parallelism",
    "collectives": "collectives of tensor and expert parallelism",
    "pipeline": "waiting in the pipeline",
    "data": "gradient reduction and weight gathering",
    "optimizer": "the optimizer",
}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One training step of a model, spread over a cluster.

    parts:   of the slowest pipeline rank; their sum is the step
    memory:  of each pipeline rank
    traffic: of a rank of the fullest pipeline stage
    """

    model: Transformer
    parallel: Parallel
    cluster: Cluster
    seq: int
    parts: Parts
    memory: tuple[MemoryUse, ...]
    traffic: StepTraffic

    @property
    def rank(self) -> RankConfig:
        """Inputs that determine the work of a rank, without traces."""
        return RankConfig(model=self.model, parallel=self.parallel, cluster=self.cluster, seq=self.seq)

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return self.parts.total

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of all ranks together."""
        return self.parallel.global_batch * self.seq / self.seconds

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return self.tokens_per_s / self.parallel.world

    def flops_per_gpu(self, causal: Fraction = Fraction(1, 2)) -> float:
        """Return the model's operations per second and rank, as Megatron's --log-throughput counts them."""
        return self.model.flops(self.seq, self.parallel.global_batch, causal) / self.seconds / self.parallel.world

    @property
    def mfu(self) -> float:
        """Share of the peak of the products' dtype that the model's operations reach, recomputation left out."""
        return self.flops_per_gpu() / self.cluster.gemm(self.parallel.precision).peak

    @property
    def worst_memory(self) -> MemoryUse:
        """Memory of the fullest rank."""
        return max(self.memory, key=lambda memory: memory.total)

    @property
    def fits(self) -> bool:
        """True if the step fits the fullest rank's memory, or if the cluster does not state a memory size."""
        return self.leaves(0.0)

    def leaves(self, headroom: float) -> bool:
        """Return True if the fullest rank leaves this share of its memory free, or if no memory size is stated."""
        return _held(self.cluster, self.memory, headroom)

    @property
    def bound_by(self) -> str:
        """Kind of work that takes most of the step, in words."""
        most = max(Parts._fields, key=lambda name: getattr(self.parts, name))
        return IN_WORDS[most]


def estimate(
    model: Transformer, parallel: Parallel, cluster: Cluster, seq: int, record: Record | None = None
) -> Estimate:
    """Estimate a step of `model` on sequences of `seq` tokens; a pure function of its arguments.

    record: makes traces of context-parallel loops (megatron_cp.context.trace.record.record); without it only their
            kernels are counted, so that the step is a lower bound for every backend
    Raises ValueError for sizes that do not divide, for a cluster without rates of matrix products, and for a run that
    the backend or the schedule refuses.
    """
    check(model, parallel, seq)
    rank = placed(RankConfig(model=model, parallel=parallel, cluster=cluster, seq=seq, record=record))
    stages = _stages(rank)
    return _timed(rank, stages, _memory(rank, stages))


def _timed(rank: RankConfig, stages: "Sequence[Stage]", memory: tuple[MemoryUse, ...]) -> Estimate:
    """Return the estimate of stages whose memory is known."""
    model, parallel, cluster, seq = rank.model, rank.parallel, rank.cluster, rank.seq
    each = _of_ranks(rank, stages)
    makespan = _makespan(rank, stages)
    slowest = max(range(parallel.pp), key=lambda at: each[at].seconds)
    spent = Seconds()
    for part in (*each[slowest].work, *head_times(rank)):
        spent = spent.plus(part, parallel.micros)
    data, optimizer = max((_after(rank, stage, at) for at, stage in enumerate(each)), key=sum)
    # without a pipeline nothing waits; rounding of the sums must not show up as waiting
    waiting = max(0.0, makespan - spent.total) if parallel.pp > 1 else 0.0
    parts = Parts(*spent, waiting, data, optimizer + cluster.step_s)
    return Estimate(
        model=model,
        parallel=parallel,
        cluster=cluster,
        seq=seq,
        parts=parts,
        memory=memory,
        traffic=step_traffic(rank, each[slowest].layers / parallel.copies),
    )


def estimate_where_it_fits(
    model: Transformer, parallel: Parallel, cluster: Cluster, seq: int, headroom: float = 0.0
) -> Estimate | None:
    """Estimate without traces; None where memory does not suffice, which is found without the slow simulation.

    headroom: share of a rank's memory that stays free
    Raises ValueError as `estimate` does.
    """
    check(model, parallel, seq)
    rank = RankConfig(model=model, parallel=parallel, cluster=cluster, seq=seq)
    stages = _stages(rank)
    memory = _memory(rank, stages)
    return _timed(rank, stages, memory) if _held(cluster, memory, headroom) else None


def _held(cluster: Cluster, memory: Sequence[MemoryUse], headroom: float) -> bool:
    return cluster.memory_bytes is None or max(one.total for one in memory) <= (1 - headroom) * cluster.memory_bytes


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


def check(model: Transformer, parallel: Parallel, seq: int) -> None:
    """Raise ValueError, with a way out, where sizes do not divide as Megatron requires."""
    if model.heads % parallel.tp:
        raise ValueError(f"tensor parallel {parallel.tp} must divide the {model.heads} attention heads; lower it")
    if max(model.kv_heads, parallel.tp) % min(model.kv_heads, parallel.tp):
        raise ValueError(f"tensor parallel {parallel.tp} and {model.kv_heads} query groups must divide; lower it")
    if parallel.sp and seq % (parallel.tp * parallel.cp):
        size = parallel.tp * parallel.cp
        raise ValueError(f"sequence parallelism needs a sequence divisible by TP x CP = {size}, got {seq}")
    if parallel.cp > 1 and seq % (2 * parallel.cp):
        raise ValueError(f"context parallel {parallel.cp} needs a sequence divisible by {2 * parallel.cp}, got {seq}")
    if model.experts % parallel.ep:
        raise ValueError(f"expert parallel {parallel.ep} must divide the {model.experts} experts")
    _check_sliced(model, parallel)
    _check_vocabulary(model, parallel)
    _check_copies(model, parallel)
    _check_messages(parallel)
    if parallel.latent and not model.latent:
        raise Refused("--cp-latent sends the latents of multi-latent attention, which this model lacks; leave it out")
    if parallel.latent:
        check_latent(BACKENDS.get(parallel.backend))
    if parallel.vp > 1 and parallel.pp == 1:
        raise ValueError(f"virtual stages ({parallel.vp}) need a pipeline; raise pp or set vp to 1")
    if parallel.layout:
        stages = parallel.pp * parallel.vp
        if len(parallel.layout) != stages or sum(parallel.layout) != model.layers:
            raise ValueError(
                f"a layout of {len(parallel.layout)} stages and {sum(parallel.layout)} layers is not one of "
                f"{parallel.pp} x {parallel.vp} stages and {model.layers} layers"
            )
        return
    slots = model.layers + (2 if parallel.balanced_ends else 0)
    if slots % (parallel.pp * parallel.vp):
        raise ValueError(
            f"{slots} layers{' with the ends' if parallel.balanced_ends else ''} do not divide into "
            f"{parallel.pp} x {parallel.vp} stages; choose other pipeline sizes"
        )


def _check_messages(parallel: Parallel) -> None:
    """Raise ValueError for quantised messages where training refuses them."""
    if not parallel.messages.asked:
        return
    if parallel.fsdp or not parallel.distributed_optimizer or parallel.instances > 1:
        raise Refused(
            "--zero-quantized-gradients and --zero-quantized-weights are of one instance of the distributed optimizer; "
            "pass --use-distributed-optimizer, without FSDP and --num-distributed-optimizer-instances"
        )
    if parallel.messages.weights and parallel.precision == "float32":
        raise Refused("--zero-quantized-weights needs weights beside the optimizer's float32 ones; pass --bf16")
    if parallel.copies > 1:
        raise Refused(
            f"two copies of the model would be rounded apart by quantised messages, got {parallel.schedule_name}; take "
            f"another --pp-schedule"
        )


def _check_sliced(model: Transformer, parallel: Parallel) -> None:
    if parallel.slices == 1:
        return
    if parallel.pp == 1 or parallel.schedule is None:
        raise Refused(f"{parallel.slices} slices of a sequence need a pipeline and --pp-schedule; add 1f1b, or take 1")
    check_slices(SCHEDULES.get(parallel.schedule), parallel.slices)
    if model.experts or model.latent or model.mtp or BACKENDS.get(parallel.backend).capabilities.over_time:
        raise Refused(
            f"{parallel.slices} slices of a sequence do not go with experts, latent attention, multi-token prediction "
            f"and attention in chunks over time (--cp-comm-type {parallel.backend}); leave --pp-slices out"
        )


def _check_vocabulary(model: Transformer, parallel: Parallel) -> None:
    """Refuse beside a vocabulary over all ranks what no training with it does."""
    if not parallel.barriers:
        return
    if parallel.pp == 1 or parallel.schedule is None:
        raise Refused(
            "a vocabulary over all ranks needs a pipeline and --pp-schedule; add 1f1b, or leave --pp-vocab-parallel out"
        )
    check_vocabulary(SCHEDULES.get(parallel.schedule), parallel.barriers, parallel.slices, parallel.moves)
    unable = {
        "multi-token prediction": bool(model.mtp),
        "output layer and loss in chunks (--cp-loss-chunks)": parallel.loss_chunks is not None,
        "products in fp8": parallel.precision == "fp8",
        "fully sharded data parallelism": parallel.fsdp,
        "islands of replicas (--local-sgd-steps)": parallel.local_steps is not None,
    }
    if told := [what for what, asked in unable.items() if asked]:
        raise Refused(f"a vocabulary over all ranks does not go with {told[0]}; leave --pp-vocab-parallel out")


def _check_copies(model: Transformer, parallel: Parallel) -> None:
    """Refuse with two copies of the model what no training with them does."""
    if parallel.copies == 1:
        return
    unable = {
        "multi-token prediction": bool(model.mtp),
        "activations that move (--pp-offload)": parallel.moves is not None,
        "fully sharded data parallelism": parallel.fsdp,
    }
    if told := [what for what, asked in unable.items() if asked]:
        raise Refused(f"{parallel.schedule} holds two copies of the model, without {told[0]}; take zb-v")


def _of_ranks(rank: RankConfig, stages: Sequence[Stage]) -> list[Stage]:
    """Return the stages of each pipeline rank, added up."""
    parallel = rank.parallel
    if parallel.pp == 1:
        return [stages[0]]
    placed, share = _placement(parallel).of_rank, 1 / parallel.copies
    whole = [sum((stages[at] for at in mine), start=Stage(0.0, PassTimes(), 0.0)) for mine in placed]
    return [stage._replace(work=PassTimes().plus(stage.work, share)) for stage in whole]


def _holds_ends(parallel: Parallel, at: int) -> tuple[bool, bool]:
    """Return True where a pipeline rank holds an embedding, and where it holds an output layer."""
    first, last = at == 0, at == parallel.pp - 1
    # the second copy begins where the first one ends
    return (first, last) if parallel.copies == 1 else (first or last, first or last)


def slowest_stage(rank: RankConfig) -> Stage:
    """Return the stages of the pipeline rank whose microbatch takes longest."""
    return max(_of_ranks(rank, _stages(rank)), key=lambda stage: stage.seconds)


def _stages(rank: RankConfig) -> list[Stage]:
    parallel, model = rank.parallel, rank.model
    count = parallel.pp * parallel.vp
    slots = (model.layers + (2 if parallel.balanced_ends else 0)) // count
    layers = [slots - (parallel.balanced_ends and at in (0, count - 1)) for at in range(count)]
    if count == 1:
        layers = [model.layers]
    layers = list(parallel.layout or layers)
    layers[-1] += model.mtp
    one = _mean_layer(rank)
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
    kept = again * mean_layer_bytes(rank)
    if again < layers:
        kept += (layers - again) * mean_layer_bytes(replace(rank, parallel=plain(rank.parallel)))
    return Stage(layers, work, kept)


def recomputed_layers(rank: RankConfig, layers: int) -> int:
    """Return the layers of a stage that are recomputed whole."""
    parallel = rank.parallel
    if parallel.recompute != "full":
        return 0
    return min(layers, parallel.recompute_layers) if parallel.recompute_method == "block" else layers


def plain(parallel: Parallel) -> Parallel:
    """Return the same run without recomputation of whole layers."""
    return replace(parallel, recompute="none") if parallel.recompute == "full" else parallel


def _mean_layer(rank: RankConfig) -> PassTimes:
    """Return the mean over dense and mixture layers, with the modules that backward recomputes."""
    work = PassTimes()
    for one, moe, share in layer_kinds(rank):
        work = work.plus(layer(one, moe).plus(PassTimes(input=recomputed(one, moe))), share)
    return work


LONG = 3
"""Microbatches per pipeline rank that are simulated; each further one adds the slowest rank's work, in two pipes, and
with a vocabulary on all ranks, as much as each of p more adds."""


def _makespan(rank: RankConfig, stages: Sequence[Stage]) -> float:
    """Return the seconds of a step's microbatches."""
    parallel = rank.parallel
    if parallel.pp == 1:
        return parallel.micros * stages[0].seconds
    schedule, costs = _played(rank, stages)
    seconds, more = simulate(schedule, costs).objective(parallel.objective), parallel.micros - schedule.sequences
    if more and (parallel.copies > 1 or parallel.barriers):
        # where two pipes get in each other's way, or all ranks meet, they wait again for every p microbatches
        longer = simulate(_schedule(parallel, schedule.sequences + parallel.pp, costs), costs)
        seconds += more * (longer.objective(parallel.objective) - seconds) / parallel.pp
    else:
        seconds += more * max(costs.work(schedule.placement))
    if parallel.barriers:
        seconds += embedding_seconds(rank, len(returned_before(schedule.table[0])[None]))
    return seconds


def _memory(rank: RankConfig, stages: Sequence[Stage]) -> tuple[MemoryUse, ...]:
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
        rank_memory(rank, stage.layers, most, *_holds_ends(rank.parallel, at), versions[at])
        for at, (stage, most) in enumerate(zip(_of_ranks(rank, stages), kept, strict=True))
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


def _placement(parallel: Parallel) -> Placement:
    return place(SCHEDULES.get(parallel.schedule_name), parallel.pp, parallel.vp, parallel.pp_placement)


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


ADAM_BYTES = 34
"""Bytes read and written per parameter: its gradient twice, float32 weight and two moments, and the model's weight."""


def _after(rank: RankConfig, stage: Stage, at: int) -> tuple[float, float]:
    """Return the seconds of one pipeline rank for exposed transfers of gradients and weights, and for the optimizer."""
    parallel, cluster = rank.parallel, rank.cluster
    dense, experts = stage_parameters(rank.model, parallel, stage.layers, *_holds_ends(parallel, at))
    weights, gradients, _ = parameter_bytes(parallel, dense, experts)
    parameters = dense + experts
    shards = parallel.shards
    spread = parallel.distributed_optimizer
    reduce = collective_seconds(cluster, "scatter" if spread else "reduce", gradients, shards, parallel.tp)
    gather = collective_seconds(cluster, "gather", weights, shards, parallel.tp) if spread else 0.0
    beside = True
    if parallel.messages.asked:
        reduce, gather = _over_nodes(rank, kinds_of(rank.model, parallel, stage.layers, *_holds_ends(parallel, at)))
        # they have a stream of their own on a GPU alone
        beside = cluster.device == "cuda"
    bucket = min(1.0, BUCKET / parameters)
    forward, backward = stage.work.forward.total, stage.work.input.total + stage.work.weight.total
    if parallel.fsdp:
        data = _fsdp(rank, parameters, stage)
    else:
        data = _left(reduce, backward, bucket, beside and parallel.overlap_grad_reduce)
        data += _left(gather, forward, bucket, beside and parallel.overlap_param_gather)
        data += _between_instances(rank, parameters, gradients)
        data += _between_copies(rank, to_peer(parallel, dense, experts), at)
    owned = parameters / (shards if parallel.distributed_optimizer or parallel.fsdp else 1)
    files = on_disk_seconds(cluster, parallel.disk_bytes * of_shards(parallel, dense, experts))
    return data, owned * ADAM_BYTES / cluster.touch_bytes_per_s + files


def _over_nodes(rank: RankConfig, kinds: ParameterKinds) -> tuple[float, float]:
    """Return the seconds of a reduction and of a gather, of which one at least is quantised."""
    parallel, cluster = rank.parallel, rank.cluster
    gradients, weights = moved_in_a_step(parallel, kinds)
    around = parallel.shards, parallel.tp
    reduce = collective_seconds(cluster, "scatter", gradients.as_ever, *around) if gradients.as_ever else 0.0
    gather = collective_seconds(cluster, "gather", weights.as_ever, *around) if weights.as_ever else 0.0
    if gradients.in_hops:
        reduce += reduce_seconds(parallel, cluster, kinds, gradients.in_hops)
    if weights.in_hops:
        gather += gather_seconds(parallel, cluster, kinds, weights.in_hops)
    return reduce, gather


def _left(seconds: float, behind: float, bucket: float, overlap: bool) -> float:
    """Return the exposed part of a transfer, all but one bucket of which can overlap with work."""
    return max(seconds * bucket, seconds - behind) if overlap else seconds


def _fsdp(rank: RankConfig, parameters: float, stage: Stage) -> float:
    """Return the exposed seconds of FSDP.

    Sharded weights are gathered for each pass, a layer ahead, sharded gradients reduced in each; others once a step.
    """
    parallel = rank.parallel
    gather = collective_seconds(rank.cluster, "gather", parameters * parallel.bytes, parallel.shards, parallel.tp)
    gradients = parameters * (4 if parallel.fp32_grads else 2)
    reduce = collective_seconds(rank.cluster, "scatter", gradients, parallel.shards, parallel.tp)
    forward, backward = stage.work.forward.total, stage.work.input.total + stage.work.weight.total
    gathers, reduces = parallel.is_sharded("params"), parallel.is_sharded("grads")
    each = max(0.0, gathers * gather - forward) + max(0.0, gathers * gather + reduces * reduce - backward)
    bucket = min(1.0, BUCKET / parameters)
    once = gather / max(1.0, stage.layers) if gathers else _left(gather, forward, bucket, parallel.overlap_param_gather)
    once += 0.0 if reduces else _left(reduce, backward, bucket, parallel.overlap_grad_reduce)
    return parallel.micros * each + once + _between_instances(rank, parameters, gradients)


def _between_copies(rank: RankConfig, size: float, at: int) -> float:
    """Return the seconds for adding up `size` bytes of gradients with the rank that has the same stages.

    Both send theirs at once, after all backwards, and read two and write one of what they add.
    """
    if not size:
        return 0.0
    parallel, cluster = rank.parallel, rank.cluster
    stride = parallel.world // parallel.pp
    link = cluster.link(at * stride, (parallel.pp - 1 - at) * stride)
    return link.hop_seconds(size) + 3 * size / cluster.touch_bytes_per_s


def _between_instances(rank: RankConfig, parameters: float, gradients: float) -> float:
    """Return the seconds for adding a rank's shard of `gradients` bytes over the instances of the optimizer.

    Islands of Local SGD average their shards of weights and moments instead, in a mean of their steps.
    """
    parallel = rank.parallel
    stride, steps = parallel.tp * parallel.shards, parallel.local_steps
    added = (gradients if steps is None else AVERAGED_BYTES * parameters) / parallel.shards
    return collective_seconds(rank.cluster, "reduce", added, parallel.instances, stride) / (steps or 1)
