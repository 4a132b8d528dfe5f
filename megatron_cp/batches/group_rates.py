"""The problem of a data-centric batch for a model on a cluster: rates of its groups, memory of its ranks.

All figures are the estimator's own: work of a stage beside attention, and attention by the trace of its loop. A group's
attention is described by two sums over its documents, so that a plan is priced without a trace: the kernels grow with
the squares of the lengths, the transfers with the tokens, and the longer of the two is waited for. Every document is
taken as cut over all ranks of its group.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import inf, lcm
from typing import NamedTuple

from megatron_cp.batches.problem import BatchProblem, GroupRate
from megatron_cp.context import BACKENDS
from megatron_cp.context.choose import Record
from megatron_cp.errors import Refused
from megatron_cp.hardware.cluster import Cluster
from megatron_cp.planner.attention import attention
from megatron_cp.planner.checks import check
from megatron_cp.planner.estimate import Estimate, estimate_where_it_fits
from megatron_cp.planner.model import Transformer
from megatron_cp.planner.parallel import Parallel
from megatron_cp.planner.plan_request import HEADROOM
from megatron_cp.planner.stages import slowest_stage
from megatron_cp.planner.work import RankConfig, problem_of

UNIT = 256
"""Tokens by which a rank's capacity is counted; a recorded loop is stretched to multiples of it."""
FASTER = 1e9
"""Times as fast as they are, kernels take no time: what is left of a loop are its calls, copies and transfers."""


class GroupRequest(NamedTuple):
    """A model and how it is spread over ranks, of which the data-parallel ones form groups.

    parallel: with dp as the ranks of a stage that form groups, and cp = 1
    record:   makes traces of context-parallel loops
    headroom: share of a rank's memory that stays free
    """

    model: Transformer
    parallel: Parallel
    cluster: Cluster
    record: Record
    headroom: float = HEADROOM

    @property
    def ranks(self) -> int:
        """Ranks that form groups."""
        return self.parallel.dp

    @property
    def per_node(self) -> int:
        """Ranks of a node that form groups."""
        return max(1, self.cluster.ranks_per_node // self.parallel.tp)

    @property
    def least(self) -> int:
        """Tokens that the length of a rank's part must be a multiple of."""
        return lcm(2, self.parallel.tp if self.parallel.sp else 1)


def batch_problem(request: GroupRequest, lengths: tuple[int, ...], capacity: int | None = None) -> BatchProblem:
    """Return the problem of a batch of documents.

    capacity: most tokens of a rank in a slot; by default as many as memory holds
    Raises Refused for sizes that do not divide, for a rank without room, and for documents that no group holds.
    """
    parallel = request.parallel
    assert parallel.cp == parallel.micro_batch == 1
    if BACKENDS.get(parallel.backend).needs_grid:
        raise Refused(f"groups of any size have no grid, which {parallel.backend} needs; take another --cp-comm-type")
    tokens = most_tokens(request) if capacity is None else capacity
    if tokens < request.least:
        raise Refused(
            f"--cp-tokens-per-rank must be at least {request.least}, twice the tensor-parallel size with sequence "
            f"parallelism, got {tokens}"
        )
    return BatchProblem(
        lengths=lengths,
        ranks=request.ranks,
        capacity=tokens,
        rates=tuple(_rates(request, tokens)),
        per_node=request.per_node,
        stages=parallel.pp,
        schedule=parallel.schedule_name,
        multiple=parallel.pp if parallel.schedule_name == "interleaved" else 1,
        # sharded weights are gathered by collectives over all ranks
        lockstep=parallel.fsdp,
        after=_after(request, tokens),
    )


def degrees(ranks: int, per_node: int) -> list[int]:
    """Return the degrees that are weighed: all inside a node, then whole and half nodes, and powers of two."""
    half = max(1, per_node // 2)
    return [
        degree
        for degree in range(1, ranks + 1)
        if degree <= per_node or degree % half == 0 or degree & (degree - 1) == 0 or degree == ranks
    ]


def _rates(request: GroupRequest, capacity: int) -> Iterator[tuple[int, GroupRate]]:
    for degree in degrees(request.ranks, request.per_node):
        try:
            yield degree, group_rate(request, degree, capacity)
        except Refused:
            # a backend that cannot share its heads among so many
            if degree == 1:
                raise


def group_rate(request: GroupRequest, degree: int, capacity: int) -> GroupRate:
    """Return the rate of groups of one degree, exact for one document that fills its ranks and for half of it."""
    full = _rank(request, degree, _rounded(request, capacity))
    half = _rank(request, degree, _rounded(request, capacity // 2))
    stage = slowest_stage(full)
    work = [_beside_attention(rank) for rank in (half, full)]
    token = max(0.0, (work[1] - work[0]) / (full.seq - half.seq)) if full.seq > half.seq else work[1] / full.seq
    fixed = max(0.0, work[1] - token * full.seq)
    layers = stage.layers
    whole, free = (_attention(rank) for rank in (full, _without_kernels(full)))
    square = layers * max(0.0, whole.kernels - free.kernels) / full.seq**2
    exchange = layers * free.idle / full.seq
    # waits that no kernel hides, as of the first transfer and the last one
    copies = layers * (whole.copies + whole.idle) - max(0.0, exchange * full.seq - square * full.seq**2)
    return GroupRate(
        fixed=fixed + layers * free.kernels,
        token=token + max(0.0, copies) / full.seq,
        square=square,
        exchange=exchange,
    )


class _LoopSeconds(NamedTuple):
    """Seconds of both passes of attention in a layer, with a pass that recomputation repeats."""

    kernels: float
    copies: float
    idle: float


def _attention(rank: RankConfig) -> _LoopSeconds:
    parallel, model = rank.parallel, rank.model
    sums = [0.0, 0.0, 0.0]
    share = model.windowed / model.layers
    for windowed, part in ((False, 1 - share), (True, share)):
        if part:
            found = attention(problem_of(rank, windowed), rank.cluster.every(parallel.tp), rank.record)
            for at, (forward, backward) in enumerate(zip(found.forward, found.backward, strict=True)):
                sums[at] += part * (forward * (2 if parallel.attends_again else 1) + backward)
    return _LoopSeconds(*sums)


def _without_kernels(rank: RankConfig) -> RankConfig:
    cluster = rank.cluster
    faster = replace(
        cluster, flops_forward=FASTER * cluster.flops_forward, flops_backward=FASTER * cluster.flops_backward
    )
    return replace(rank, cluster=faster)


def _beside_attention(rank: RankConfig) -> float:
    """Return the seconds of a microbatch on the slowest pipeline rank without attention."""
    alone = replace(rank, record=None)
    return sum(part.total - part.attention - part.context for part in slowest_stage(alone).work)


def _rank(request: GroupRequest, degree: int, tokens: int) -> RankConfig:
    given, ranks = request.parallel, degree * request.parallel.tp
    # as many groups as share experts
    groups = lcm(ranks, given.ep * given.expert_tp) // ranks
    parallel = replace(given, cp=degree, dp=groups, global_batch=max(1, given.pp) * groups)
    check(request.model, parallel, degree * tokens)
    return RankConfig(
        model=request.model,
        parallel=parallel,
        cluster=request.cluster,
        seq=degree * tokens,
        record=request.record,
    )


def _rounded(request: GroupRequest, tokens: int) -> int:
    """Return a number of tokens that a rank's part of a sequence may have, a multiple of UNIT where it can be."""
    unit = lcm(UNIT, request.least)
    unit = unit if tokens >= unit else request.least
    return max(unit, tokens // unit * unit)


def most_tokens(request: GroupRequest) -> int:
    """Return the most tokens of a rank in a slot that memory holds, a multiple of UNIT.

    Raises Refused where the cluster states no memory, or has none left for activations.
    """
    if request.cluster.memory_bytes is None:
        raise Refused(
            f"cluster {request.cluster.name!r} does not say how much memory a rank has; give --cp-tokens-per-rank"
        )
    low, high = 0, 1 << 12
    while _holds(request, high * UNIT):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _holds(request, middle * UNIT) else (low, middle)
    if low == 0:
        raise Refused(
            f"a rank of {request.cluster.name} has no room for {UNIT} tokens of {request.model.name} beside weights, "
            f"gradients and optimizer; raise --tp or --pp, take more --ranks, or add --recompute full"
        )
    return low * UNIT


def _holds(request: GroupRequest, tokens: int) -> bool:
    found = _alone(request, tokens)
    if found is None:
        return False
    # what a loop keeps of other ranks' keys and values, in as large a group as is recorded exactly
    degree = min(8, request.ranks)
    live = 0.0
    if degree > 1:
        rank = _rank(request, degree, tokens)
        live = attention(problem_of(rank), rank.cluster.every(rank.parallel.tp), rank.record).live
    room = (1 - request.headroom) * (request.cluster.memory_bytes or inf)
    return found.worst_memory.total + live <= room


def _alone(request: GroupRequest, tokens: int) -> Estimate | None:
    """Return the estimate of a step of documents of so many tokens, each on a rank alone; None without memory."""
    parallel = replace(request.parallel, global_batch=2 * request.parallel.pp * request.ranks)
    return estimate_where_it_fits(request.model, parallel, request.cluster, tokens, request.headroom)


def _after(request: GroupRequest, tokens: int) -> float:
    """Return the seconds of a step for the optimizer, and for gradients and weights that nothing hides."""
    parallel = replace(request.parallel, global_batch=2 * request.parallel.pp * request.ranks)
    unlimited = replace(request.cluster, memory_bytes=None)
    found = estimate_where_it_fits(request.model, parallel, unlimited, _rounded(request, tokens))
    assert found
    return found.parts.data + found.parts.optimizer
