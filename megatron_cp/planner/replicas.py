"""Seconds after the microbatches: what replicas exchange of gradients and weights, and the optimizer."""

from megatron_cp.planner.memory import BUCKET, kinds_of, moved_in_a_step, of_shards, parameter_bytes, stage_parameters
from megatron_cp.planner.quantised import ParameterKinds, gather_seconds, reduce_seconds
from megatron_cp.planner.stages import Stage, holds_ends
from megatron_cp.planner.tiers import on_disk_seconds
from megatron_cp.planner.traffic import AVERAGED_BYTES, to_peer
from megatron_cp.planner.work import RankConfig, collective_seconds

ADAM_BYTES = 34
"""Bytes read and written per parameter: its gradient twice, float32 weight and two moments, and the model's weight."""


def data_and_optimizer(rank: RankConfig, stage: Stage, at: int) -> tuple[float, float]:
    """Return the seconds of one pipeline rank for exposed transfers of gradients and weights, and for the optimizer."""
    parallel, cluster = rank.parallel, rank.cluster
    dense, experts = stage_parameters(rank.model, parallel, stage.layers, *holds_ends(parallel, at))
    weights, gradients, _ = parameter_bytes(parallel, dense, experts)
    parameters = dense + experts
    shards = parallel.shards
    spread = parallel.distributed_optimizer
    reduce = collective_seconds(cluster, "scatter" if spread else "reduce", gradients, shards, parallel.tp)
    gather = collective_seconds(cluster, "gather", weights, shards, parallel.tp) if spread else 0.0
    beside = True
    if parallel.messages.asked:
        reduce, gather = _over_nodes(rank, kinds_of(rank.model, parallel, stage.layers, *holds_ends(parallel, at)))
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
