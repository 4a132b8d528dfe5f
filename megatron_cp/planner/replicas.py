"""Seconds after the microbatches: what replicas exchange of gradients and weights, and the optimizer."""

from megatron_cp.hardware.cluster import Collective
from megatron_cp.planner.memory import BUCKET, gradient_bytes, kinds_of, moved_in_a_step, of_shards, stage_parameters
from megatron_cp.planner.quantised import Moved, ParameterKinds, gather_seconds, reduce_seconds
from megatron_cp.planner.stages import Stage, holds_ends
from megatron_cp.planner.tiers import on_disk_seconds
from megatron_cp.planner.traffic import AVERAGED_BYTES, to_peer
from megatron_cp.planner.work import RankConfig, collective_seconds

ADAM_BYTES = 34
"""Bytes read and written per parameter: its gradient twice, float32 weight and two moments, and the model's weight."""


def data_and_optimizer(rank: RankConfig, stage: Stage, at: int) -> tuple[float, float]:
    """Return the seconds of one pipeline rank for exposed transfers of gradients and weights, and for the optimizer."""
    parallel, cluster = rank.parallel, rank.cluster
    of_rank = rank.model, parallel, stage.layers, *holds_ends(parallel, at)
    dense, experts = stage_parameters(*of_rank)
    kinds = kinds_of(*of_rank)
    parameters, owned = dense + experts, of_shards(parallel, dense, experts)
    bucket = min(1.0, BUCKET / parameters)
    forward, backward = stage.work.forward.total, stage.work.input.total + stage.work.weight.total
    reduce, gather = _seconds(rank, kinds)
    if parallel.fsdp:
        data = _fsdp(rank, reduce, gather, bucket, stage) + _between_instances(rank, owned)
    else:
        # quantised messages have a stream of their own on a GPU alone
        beside = cluster.device == "cuda" or not parallel.messages.asked
        data = _left(reduce, backward, bucket, beside and parallel.overlap_grad_reduce)
        data += _left(gather, forward, bucket, beside and parallel.overlap_param_gather)
        data += _between_instances(rank, owned)
        data += _between_copies(rank, to_peer(parallel, dense, experts), at)
    stepped = owned if parallel.distributed_optimizer or parallel.fsdp else parameters
    files = on_disk_seconds(cluster, parallel.disk_bytes * owned)
    return data, stepped * ADAM_BYTES / cluster.touch_bytes_per_s + files


def _seconds(rank: RankConfig, kinds: ParameterKinds) -> tuple[float, float]:
    """Return the seconds of a reduction of gradients and of a gather of weights.

    Experts travel around the ranks that hold the same ones, as expert data parallelism has them.
    """
    parallel, cluster = rank.parallel, rank.cluster
    spread = parallel.distributed_optimizer or parallel.fsdp
    gradients, weights = moved_in_a_step(parallel, kinds)
    reduce = _around(rank, "scatter" if spread else "reduce", gradients)
    gather = _around(rank, "gather", weights) if spread else 0.0
    if gradients.in_hops:
        reduce += reduce_seconds(parallel, cluster, kinds, gradients.in_hops)
    if weights.in_hops:
        gather += gather_seconds(parallel, cluster, kinds, weights.in_hops)
    return reduce, gather


def _around(rank: RankConfig, kind: Collective, size: Moved) -> float:
    """Return the seconds of what does not travel in two hops."""
    parallel, groups = rank.parallel, []
    if size.as_ever:
        groups.append((size.as_ever, parallel.shards, parallel.tp))
    if size.experts:
        groups.append((size.experts, parallel.expert_shards, parallel.expert_tp * parallel.ep))
    return sum(collective_seconds(rank.cluster, kind, *group) for group in groups)


def _left(seconds: float, behind: float, bucket: float, overlap: bool) -> float:
    """Return the exposed part of a transfer, all but one bucket of which can overlap with work."""
    return max(seconds * bucket, seconds - behind) if overlap else seconds


def _fsdp(rank: RankConfig, reduce: float, gather: float, bucket: float, stage: Stage) -> float:
    """Return the exposed seconds of FSDP, of a reduction and a gather of all parameters of a rank.

    Sharded weights are gathered for each pass, a layer ahead, sharded gradients reduced in each; others once a step.
    """
    parallel = rank.parallel
    forward, backward = stage.work.forward.total, stage.work.input.total + stage.work.weight.total
    gathers, reduces = parallel.is_sharded("params"), parallel.is_sharded("grads")
    each = max(0.0, gathers * gather - forward) + max(0.0, gathers * gather + reduces * reduce - backward)
    once = gather / max(1.0, stage.layers) if gathers else _left(gather, forward, bucket, parallel.overlap_param_gather)
    once += 0.0 if reduces else _left(reduce, backward, bucket, parallel.overlap_grad_reduce)
    return parallel.micros * each + once


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


def _between_instances(rank: RankConfig, owned: float) -> float:
    """Return the seconds for adding the gradients of a rank's shard of so many parameters over the instances.

    Islands of Local SGD average their shards of weights and moments instead, in a mean of their steps.
    """
    parallel = rank.parallel
    stride, steps = parallel.tp * parallel.shards, parallel.local_steps
    added = (gradient_bytes(parallel) if steps is None else AVERAGED_BYTES) * owned
    return collective_seconds(rank.cluster, "reduce", added, parallel.instances, stride) / (steps or 1)
