"""Every split of a model over a number of GPUs that Megatron's rules allow."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from megatron_cp.grid import divisors
from megatron_cp.pipeline import SCHEDULES as PIPELINES
from megatron_cp.planner.dispatch import weighed
from megatron_cp.planner.parallel import Parallel, megatrons_schedule
from megatron_cp.planner.plan_request import PlanRequest
from megatron_cp.planner.work import RankConfig

CHUNKS = (1, 2, 4, 8)
MICRO_BATCHES = (1, 2, 4, 8)
MOST_TOKENS = 65536
"""Largest microbatch of a rank in tokens: products reach their rate with fewer, and activations keep growing."""


class RankSplit(NamedTuple):
    """Parallel sizes of a split; splits that differ only in other choices share one line of the result."""

    tp: int
    cp: int
    pp: int
    dp: int
    ep: int


def sizes_of(parallel: Parallel) -> RankSplit:
    """Return the parallel sizes of a split."""
    return RankSplit(parallel.tp, parallel.cp, parallel.pp, parallel.dp, parallel.ep)


def rank_splits(request: PlanRequest, left_out: Counter[str]) -> Iterator[RankSplit]:
    """Yield all parallel sizes that Megatron's rules of divisibility and the fixed sizes allow."""
    fixed = request.fixed
    for tp in [fixed.tp] if fixed.tp else powers(request.gpus):
        if request.gpus % tp:
            continue
        if reason := _tensor_rule(request, tp):
            left_out[reason] += 1
            continue
        for cp in [fixed.cp] if fixed.cp else powers(request.gpus // tp):
            if request.gpus % (tp * cp):
                continue
            if cp > 1 and request.seq % (2 * cp):
                left_out["sequence divisible by twice CP"] += 1
                continue
            yield from _rest_of_splits(request, tp, cp, left_out)


def _tensor_rule(request: PlanRequest, tp: int) -> str:
    model = request.model
    if tp > request.cluster.ranks_per_node:
        return "tensor parallel inside a node"
    if model.heads % tp or model.ffn % tp or max(model.kv_heads, tp) % min(model.kv_heads, tp):
        return "heads, query groups and MLP width divisible by TP"
    return ""


def _rest_of_splits(request: PlanRequest, tp: int, cp: int, left_out: Counter[str]) -> Iterator[RankSplit]:
    model = request.model
    for pp in divisors(request.gpus // (tp * cp)):
        dp, chunks = request.gpus // (tp * cp * pp), request.fixed.vp or 1
        if not request.fixed.allow(pp=pp, dp=dp) or (pp == 1 and chunks > 1):
            continue
        if pp > model.layers or (model.layers % pp and (model.layers + 2) % pp):
            left_out["layers divisible by PP"] += 1
            continue
        if request.global_batch % dp:
            left_out["batch divisible by DP"] += 1
            continue
        if request.messages.asked and dp * cp == 1:
            left_out["DP or CP for quantised messages"] += 1
            continue
        for ep in divisors(model.experts) if model.experts else [1]:
            sizes = RankSplit(tp, cp, pp, dp, ep)
            if dp * cp % ep or not request.fixed.allow(ep=ep):
                continue
            if _divides_kept(request, sizes):
                yield sizes
            else:
                left_out["sizes that the recipe's flags divide"] += 1


def _divides_kept(request: PlanRequest, sizes: RankSplit) -> bool:
    """Return True where the sizes go with the instances and the experts' tensor parallelism that every plan has."""
    try:
        Parallel(**sizes._asdict(), global_batch=sizes.dp, **request.kept)
    except ValueError:
        return False
    return True


def powers(most: int) -> list[int]:
    """Return the powers of two that divide `most`."""
    return [1 << at for at in range(most.bit_length()) if most % (1 << at) == 0]


def splits(request: PlanRequest, sizes: RankSplit) -> Iterator[Parallel]:
    """Yield the splits with these parallel sizes, except the choices of recomputation and of context parallelism."""
    layers, fixed = request.model.layers, request.fixed
    in_files = {"state_dir": request.state_dir, "state_weights": True} if request.state_dir else {}
    for micro in [fixed.micro_batch] if fixed.micro_batch else MICRO_BATCHES:
        if request.global_batch % (sizes.dp * micro):
            continue
        if micro > 1 and not fixed.micro_batch and micro * request.seq // sizes.cp > MOST_TOKENS:
            continue
        chunks = (fixed.vp,) if fixed.vp else CHUNKS
        for vp in chunks if sizes.pp > 1 else (1,):
            stages = sizes.pp * vp
            if layers % stages and (layers + 2) % stages:
                continue
            for schedule, slices, barriers in _orders(request, sizes.pp, vp):
                yield _dispatching(
                    request,
                    Parallel(
                        **sizes._asdict(),
                        vp=vp,
                        sp=sizes.tp > 1,
                        micro_batch=micro,
                        global_batch=request.global_batch,
                        schedule=schedule,
                        slices=slices,
                        barriers=barriers,
                        messages=request.messages,
                        balanced_ends=layers % stages != 0,
                        precision=request.precision,
                        **{**request.kept, **in_files},
                    ),
                )


def _orders(request: PlanRequest, pp: int, vp: int) -> Iterator[tuple[str | None, int, int]]:
    """Yield the schedules as they are, with each number of slices where they take some, and of barriers likewise."""
    model = request.model
    for schedule in _schedules(request, pp, vp):
        yield schedule, 1, 0
        if pp == 1:
            continue
        name = schedule or megatrons_schedule(vp)
        rule = PIPELINES.get(name)
        if rule.takes_slices and not (model.experts or model.latent or model.mtp):
            yield from ((name, slices, 0) for slices in request.slices if slices > 1)
        if not rule.no_vocabulary and not model.mtp and request.precision != "fp8":
            yield from ((name, 1, barriers) for barriers in request.barriers)


def _schedules(request: PlanRequest, pp: int, vp: int) -> list[str | None]:
    if pp == 1:
        return [None]
    rules = map(PIPELINES.get, request.schedules)
    fitting = [rule.name for rule in rules if rule.chunks == vp or (rule.chunks is None and vp > 1)]
    return [None if name == megatrons_schedule(vp) else name for name in fitting]


def _dispatching(request: PlanRequest, parallel: Parallel) -> Parallel:
    """Return the split with the way of tokens to experts that takes least time."""
    rank = config_of(request, parallel)
    if not request.model.experts or rank.expert_ranks.all == 1:
        return parallel
    return replace(parallel, dispatch=weighed(rank, request.exchanges, request.pieces)[0].dispatch)


def config_of(request: PlanRequest, parallel: Parallel) -> RankConfig:
    """Return the inputs that determine the work of a rank, without traces."""
    return RankConfig(model=request.model, parallel=parallel, cluster=request.cluster, seq=request.seq)
