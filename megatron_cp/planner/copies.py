"""Price copies of busy experts in training: seconds and bytes of their weights and gradients, and memory.

Weights travel there once in a step, gradients home in the backward of each microbatch. Those that leave a layer ahead
travel beside that layer's passes, but for those of the first layer of a stage, and for gradients of layers that are
computed again. Left out: the host's time for a plan, and that messages of tokens and of copies share the links.
"""

from megatron_cp.experts.copies import sent_bytes
from megatron_cp.experts.dispatch_cost import SentBytes
from megatron_cp.pipeline import SCHEDULES
from megatron_cp.planner.work import LayerKind, PassTimes, RankConfig, Seconds, layer_kinds


def expert_bytes(rank: RankConfig) -> int:
    """Return the bytes of one expert's parameters on a rank, of which a copy is one."""
    model, parallel = rank.model, rank.parallel
    return parallel.bytes * model.matrices * model.hidden * model.expert_ffn // parallel.expert_tp


def lent_times(rank: RankConfig, one: PassTimes, layers: float, again: float) -> PassTimes:
    """Return the seconds in which the layers of a stage wait for copies and for their gradients, for a microbatch.

    one:   passes of a mean layer, beside which copies travel that leave a layer ahead
    again: layers that are computed again
    """
    parallel = rank.parallel
    split = parallel.schedule is not None and SCHEDULES.get(parallel.schedule).split
    # nothing is beside the computation on a CPU
    ahead = parallel.expert_copies.ahead if rank.cluster.device == "cuda" else 0
    first = min(1.0, layers) if ahead else layers
    forward, backward = one.forward.total, one.input.total + (0.0 if split else one.weight.total)
    there, home = 0.0, 0.0
    for kind in _with_copies(rank):
        seconds, whole = _seconds(kind.rank), max(first, again)
        there += kind.share * (first * seconds + (layers - first) * max(0.0, seconds - ahead * forward))
        home += kind.share * (whole * seconds + (layers - whole) * max(0.0, seconds - ahead * backward))
    return PassTimes(Seconds(collectives=there / parallel.micros), Seconds(collectives=home))


def _seconds(rank: RankConfig) -> float:
    """Return the seconds of one exchange of a layer's copies: its latencies, and the bytes of the busiest port."""
    if not (found := rank.copied) or not found.plan.copies:
        return 0.0
    ranks, cluster = rank.expert_ranks, rank.cluster
    link = cluster.link(0, (ranks.sharing - 1) * ranks.tensor)
    return (ranks.sharing - 1) * link.least_s + found.port * expert_bytes(rank) / link.rate("gather")


def sent_in_a_step(rank: RankConfig) -> SentBytes:
    """Return what a rank sends of copies and of their gradients in a step, of a mean layer and a mean rank."""
    sent, parallel = SentBytes(0.0, 0.0), rank.parallel
    nodes = [at * parallel.expert_tp // rank.cluster.ranks_per_node for at in range(parallel.ep)]
    for kind in _with_copies(rank):
        assert kind.rank.copied
        each = sent_bytes(kind.rank.copied.plan, expert_bytes(kind.rank), parallel.micros, nodes)
        sent = sent.plus(each, kind.share)
    return sent


def copies_bytes(rank: RankConfig, layers: float) -> tuple[float, float]:
    """Return the bytes of the copies on the rank that hosts most, and of those on their way there and home.

    Weights of copies stay until a layer's next step; gradients that leave a layer ahead are on their way with the next.

    layers: of the rank
    """
    kinds = [(kind, kind.rank.copied) for kind in _with_copies(rank)]
    hosted = sum(kind.share * found.hosts * expert_bytes(kind.rank) for kind, found in kinds if found)
    moved = max((found.moved * expert_bytes(kind.rank) for kind, found in kinds if found), default=0)
    return layers * hosted, moved * (1 + rank.parallel.expert_copies.ahead)


def _with_copies(rank: RankConfig) -> list[LayerKind]:
    return [kind for kind in layer_kinds(rank) if kind.moe and kind.rank.copied]
