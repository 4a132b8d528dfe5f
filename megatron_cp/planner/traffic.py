"""Count the bytes that a rank sends in a step, by level of links and by kind of parallelism."""

from typing import NamedTuple

from megatron_cp.planner.memory import parameter_bytes, stage_parameters
from megatron_cp.planner.work import RankConfig, context_attention


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
    """Return the traffic of a rank with `layers` layers."""
    parallel, model = rank.parallel, rank.model
    micros = parallel.micros
    wide = rank.tokens * model.hidden * parallel.bytes
    tensor = 10 if parallel.sp else 8
    attention = context_attention(rank)
    sequences = micros * parallel.micro_batch * layers
    hops = 2 * parallel.vp if parallel.pp > 1 else 0
    dense, experts = stage_parameters(model, parallel, layers, parallel.pp == 1, parallel.pp == 1)
    weights, gradients, _ = parameter_bytes(parallel, dense, experts)
    shards = parallel.dp * parallel.cp
    routed = model.top_k * model.hidden * parallel.bytes * rank.split_tokens * layers * model.moe_layers / model.layers
    spread = {
        "tensor": (_around(tensor * micros * layers * wide, parallel.tp), parallel.tp, 1),
        "pipeline": (
            micros * hops * rank.split_tokens * model.hidden * parallel.bytes,
            2,
            parallel.world // parallel.pp,
        ),
        "data": (_around(weights + gradients, shards), shards, parallel.tp),
        "expert": (_around(4 * micros * routed, parallel.ep), parallel.ep, parallel.tp),
    }
    inside, between = {"context": sequences * attention.inside}, {"context": sequences * attention.between}
    for name, (size, ranks, stride) in spread.items():
        away = _share_between(rank, ranks, stride)
        inside[name], between[name] = size * (1 - away), size * away
    return StepTraffic(Level(**inside), Level(**between))


def _around(size: float, ranks: int) -> float:
    """Return the bytes that each of `ranks` ranks sends to gather or reduce `size` bytes."""
    return size * (ranks - 1) / ranks


def _share_between(rank: RankConfig, ranks: int, stride: int) -> float:
    """Return the share of a ring's hops that leave a node."""
    per_node = max(1, rank.cluster.ranks_per_node // stride)
    return 0.0 if ranks <= per_node else 1 / per_node
