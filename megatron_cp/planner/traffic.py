"""Count the bytes that a rank sends in a step, by level of links and by kind of parallelism."""

from typing import NamedTuple

from megatron_cp.experts.dispatch_cost import SentBytes, dispatch_bytes
from megatron_cp.pipeline import SCHEDULES
from megatron_cp.planner.copies import sent_in_a_step
from megatron_cp.planner.memory import (
    gradient_bytes,
    kinds_of,
    moved_in_a_step,
    of_shards,
    parameter_bytes,
    stage_parameters,
)
from megatron_cp.planner.parallel import Parallel
from megatron_cp.planner.quantised import Moved, ParameterKinds, node_hops, sent_in_hops
from megatron_cp.planner.vocabulary import sent_bytes
from megatron_cp.planner.work import RankConfig, context_attention, layer_kinds, linears_of
from megatron_cp.tensor import CUBE, MEGATRONS
from megatron_cp.tensor.place import cube_side

AVERAGED_BYTES = 12
"""Bytes a parameter that islands of Local SGD average: its weight and two moments in float32."""


class Level(NamedTuple):
    """Bytes sent by tensor, context, pipeline, data and expert parallelism."""

    tensor: float = 0.0
    context: float = 0.0
    pipeline: float = 0.0
    data: float = 0.0
    expert: float = 0.0

    @property
    def total(self) -> float:
        return sum(self)


class StepTraffic(NamedTuple):
    """Bytes that one rank sends in one step: within its node, and to other nodes."""

    inside: Level
    between: Level


def step_traffic(rank: RankConfig, layers: float) -> StepTraffic:
    """Return the traffic of a rank with `layers` layers of one copy of the model."""
    parallel, model = rank.parallel, rank.model
    micros = parallel.micros
    grid = parallel.placing.size
    tensor, weights_axis = _of_linears(rank, layers)
    attention = context_attention(rank)
    sequences = micros * parallel.micro_batch * layers
    hops = 2 * parallel.vp if parallel.pp > 1 else 0
    of_rank = parallel.copies * layers, parallel.pp == 1, parallel.pp == 1
    dense, experts = stage_parameters(model, parallel, *of_rank)
    shards = parallel.shards
    in_hops, data, of_same_experts = _of_replicas(parallel, kinds_of(model, parallel, *of_rank))
    spread = {
        "tensor": (micros * tensor, grid.tokens, grid.weights),
        "pipeline": (
            micros * hops * rank.split_tokens * model.hidden * parallel.bytes,
            2,
            parallel.world // parallel.pp,
        ),
        "data": (_around(data, shards), shards, parallel.tp),
    }
    again = _share_attended_again(parallel, layers)
    of_experts = _of_experts(rank, _share_dispatched_again(parallel, layers))
    of_copies = sent_in_a_step(rank)
    inside = {
        "context": sequences * (attention.inside + again * attention.again_inside),
        "expert": layers * (micros * of_experts.inside + of_copies.inside),
    }
    between = {
        "context": sequences * (attention.between + again * attention.again_between),
        "expert": layers * (micros * of_experts.between + of_copies.between),
    }
    for name, (size, ranks, stride) in spread.items():
        away = _share_between(rank, ranks, stride)
        inside[name], between[name] = size * (1 - away), size * away
    away = _share_between(rank, parallel.expert_shards, parallel.expert_tp * parallel.ep)
    sent = _around(of_same_experts, parallel.expert_shards)
    inside["data"] += sent * (1 - away)
    between["data"] += sent * away
    near, far = sent_in_hops(in_hops, node_hops(parallel, rank.cluster)) if in_hops else (0.0, 0.0)
    inside["data"] += near
    between["data"] += far
    away = _share_between(rank, parallel.instances, parallel.tp * shards)
    sent = _around(_between_instances(parallel, of_shards(parallel, dense, experts)), parallel.instances)
    inside["data"] += sent * (1 - away)
    between["data"] += sent * away
    if sent := to_peer(parallel, dense, experts):
        # of the pairs of ranks that with both ends lies farthest apart
        away = _share_between(rank, 2, parallel.world - parallel.world // parallel.pp)
        inside["data"] += sent * (1 - away)
        between["data"] += sent * away
    if parallel.barriers:
        sent = micros * sent_bytes(rank)
        away = _share_between(rank, parallel.pp, parallel.world // parallel.pp)
        inside["pipeline"] += sent * (1 - away)
        between["pipeline"] += sent * away
    # weights are gathered by neighbours
    away = _share_between(rank, grid.weights, 1)
    inside["tensor"] += micros * weights_axis * (1 - away)
    between["tensor"] += micros * weights_axis * away
    return StepTraffic(Level(**inside), Level(**between))


def _of_experts(rank: RankConfig, again: float) -> SentBytes:
    """Return the bytes of tokens on their way to experts and back, of a microbatch and a mean layer.

    again: share of the layers that send in backward what their forward has sent, half of both passes, once more
    """
    sent = SentBytes(0.0, 0.0)
    for one, moe, share in layer_kinds(rank):
        if moe:
            size = one.dispatched(one.travelling.mean)
            both = dispatch_bytes(one.dispatch, size, one.expert_ranks, one.cluster)
            sent = sent.plus(both, share * (1 + again / 2))
    return sent


def to_peer(parallel: Parallel, dense: float, experts: float) -> float:
    """Return the bytes of gradients that a rank sends to the other one that has its stages; 0 with one copy.

    With the distributed optimizer these are the gradients of its shards.
    """
    if parallel.copies == 1:
        return 0.0
    added = of_shards(parallel, dense, experts) if parallel.distributed_optimizer else dense + experts
    _, gradients, _ = parameter_bytes(parallel, added, 0.0)
    return gradients


def _share_attended_again(parallel: Parallel, layers: float) -> float:
    """Return the share of the layers whose recomputation sends what attention's forward has sent once more."""
    if not parallel.attends_again:
        return 0.0
    return _share_recomputed(parallel, layers) if parallel.recompute == "full" else 1.0


def _share_dispatched_again(parallel: Parallel, layers: float) -> float:
    """Return the share of the mixture layers whose recomputation sends tokens to experts and back once more."""
    if parallel.recompute == "selective":
        return float("moe" in parallel.recomputed)
    return _share_recomputed(parallel, layers)


def _share_recomputed(parallel: Parallel, layers: float) -> float:
    """Return the share of the layers that are recomputed whole."""
    if parallel.recompute != "full":
        return 0.0
    in_blocks = parallel.recompute_method == "block"
    return min(1.0, parallel.vp * parallel.recompute_layers / layers) if in_blocks and layers else 1.0


def _of_replicas(parallel: Parallel, kinds: ParameterKinds) -> Moved:
    """Return the bytes that a step moves around groups of data-parallel ranks.

    Gradients are scattered and weights gathered, by FSDP those that it shards in every microbatch, weights twice;
    without a distributed optimizer gradients are added, which moves them twice.
    """
    gradients, weights = moved_in_a_step(parallel, kinds)
    if not (parallel.fsdp or parallel.distributed_optimizer):
        return gradients.plus(gradients)
    scattered = parallel.micros if parallel.fsdp and parallel.is_sharded("grads") else 1
    gathered = 2 * parallel.micros if parallel.fsdp and parallel.is_sharded("params") else 1
    return Moved(0.0, 0.0, 0.0).plus(gradients, scattered).plus(weights, gathered)


def _between_instances(parallel: Parallel, owned: float) -> float:
    """Return the bytes that a step moves between instances of the optimizer, of a rank's shard of so many parameters.

    Gradients are added, which moves them twice; islands of Local SGD average weights and moments once in their steps.
    """
    if not (parallel.fsdp or parallel.distributed_optimizer):
        return 0.0
    steps = parallel.local_steps
    return 2 * owned * (gradient_bytes(parallel) if steps is None else AVERAGED_BYTES / steps)


def _of_linears(rank: RankConfig, layers: float) -> tuple[float, float]:
    """Return the bytes of a microbatch that a rank's linears send over the token axis and over the weight axis."""
    parallel, model = rank.parallel, rank.model
    if parallel.tp_scheme == MEGATRONS:
        wide = rank.tokens * model.hidden * parallel.bytes
        return _around((10 if parallel.sp else 8) * layers * wide, parallel.tp), 0.0
    split = parallel.schedule is not None and SCHEDULES.get(parallel.schedule).split
    share = model.moe_layers / model.layers
    sums = [0.0, 0.0]
    for moe, part in ((False, 1 - share), (True, share)):
        for axis, elements in enumerate(linears_of(rank, moe).sent(parallel.placing.size, split=split)):
            sums[axis] += layers * part * elements * parallel.bytes
    if parallel.tp_scheme == CUBE:
        return layers * parallel.bytes * linears_of(rank, moe=False).sent_on_cube(
            cube_side(parallel.tp), split=split
        ), 0.0
    return sums[0], sums[1]


def _around(size: float, ranks: int) -> float:
    """Return the bytes that each of `ranks` ranks sends to gather or reduce `size` bytes."""
    return size * (ranks - 1) / ranks


def _share_between(rank: RankConfig, ranks: int, stride: int) -> float:
    """Return the share of a ring's hops that leave a node."""
    per_node = max(1, rank.cluster.ranks_per_node // stride)
    return 0.0 if ranks <= per_node else 1 / per_node
