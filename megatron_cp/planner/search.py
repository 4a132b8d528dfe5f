"""Search the parallel sizes that train a model fastest on a number of GPUs of a cluster, by the estimator.

A branch-and-bound search: every split that Megatron's rules and the memory allow gets a lower bound, in which context
parallelism costs only its kernels. In the order of these bounds the splits are estimated with the traces of their
loops, until a bound is worse than all plans to show.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from math import prod
from typing import NamedTuple

from megatron_cp.context import BACKENDS
from megatron_cp.context.choose import Record
from megatron_cp.context.trace.stretch import stretching
from megatron_cp.errors import Refused
from megatron_cp.experts.dispatch_cost import STOCK
from megatron_cp.grid import Grid, divisors
from megatron_cp.hardware.cluster import Cluster
from megatron_cp.pipeline import SCHEDULES as PIPELINES
from megatron_cp.pipeline.offload import Offload
from megatron_cp.pipeline.vocabulary import check_barriers
from megatron_cp.planner.dispatch import dispatch_why, placement_why, weighed
from megatron_cp.planner.estimate import IN_WORDS, Estimate, Parts, estimate, estimate_where_it_fits
from megatron_cp.planner.memory import parameter_bytes, stage_parameters
from megatron_cp.planner.model import Transformer
from megatron_cp.planner.parallel import NOT_QUANTISED, Parallel, QuantisedMessages, megatrons_schedule
from megatron_cp.planner.work import RankConfig, linears_of
from megatron_cp.tensor import MEGATRONS, SCHEMES
from megatron_cp.tensor.cost import Cheapest, cheapest

CONTEXT = tuple(entry.name for entry in BACKENDS if entry.capabilities.planned)
"""Default backends of a search, one for each kind of traffic."""

SCHEDULED = ("1f1b", "interleaved", "zb-h1", "izb")
"""Default schedules of a search."""

CHUNKS = (1, 2, 4, 8)
MICRO_BATCHES = (1, 2, 4, 8)
MOST_TOKENS = 65536
"""Largest microbatch of a rank in tokens: products reach their rate with fewer, and activations keep growing."""

HEADROOM = 0.05
"""Default share of a GPU's memory that a plan leaves free: the largest error of the memory estimate."""

AS_FAST = 0.01
MUCH_SMALLER = 0.85
"""A plan that takes at most 1 % longer with at most 85 % of the best plan's memory is named beside it."""


class FixedSizes(NamedTuple):
    """Parallel sizes that a search does not vary; None is free."""

    tp: int | None = None
    cp: int | None = None
    pp: int | None = None
    dp: int | None = None
    ep: int | None = None
    vp: int | None = None
    micro_batch: int | None = None

    @property
    def given(self) -> dict[str, int]:
        return {name: size for name, size in self._asdict().items() if size is not None}

    def allow(self, **sizes: int) -> bool:
        """Return True if none of these sizes differs from a fixed one."""
        return all(self.given.get(name, size) == size for name, size in sizes.items())


ANY_SIZES = FixedSizes()


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """A model to train, the hardware, and the choices to search.

    global_batch: sequences of a step
    offload:      where memory is short, activations may move to the host beside recomputation
    slices:       numbers of slices of a sequence to weigh beside whole sequences
    barriers:     numbers of barriers of a vocabulary on all pipeline ranks, to weigh beside one on the end ranks
    tensor:       schemes of tensor parallelism; others than Megatron's own need its local linears
    tp_overlap:   TransformerEngine's linears overlap their communication, where Megatron's own scheme stays
    exchanges:    ours of experts, to weigh beside Megatron's dispatchers
    pieces:       numbers of pieces of routed tokens to weigh beside whole microbatches
    messages:     that are quantised between replicas, in every plan
    state_dir:    of the files that hold the optimizer's state; None for memory
    fixed:        sizes that are given
    headroom:     share of a GPU's memory that stays free
    """

    model: Transformer
    seq: int
    gpus: int
    cluster: Cluster
    global_batch: int
    precision: str = "bfloat16"
    backends: tuple[str, ...] = CONTEXT
    schedules: tuple[str, ...] = SCHEDULED
    offload: bool = False
    slices: tuple[int, ...] = ()
    barriers: tuple[int, ...] = ()
    tensor: tuple[str, ...] = (MEGATRONS,)
    tp_overlap: bool = False
    exchanges: tuple[str, ...] = ()
    pieces: tuple[int, ...] = ()
    messages: QuantisedMessages = NOT_QUANTISED
    state_dir: str | None = None
    fixed: FixedSizes = ANY_SIZES
    headroom: float = HEADROOM


class RankSplit(NamedTuple):
    """Parallel sizes of a split; splits that differ only in other choices share one line of the result."""

    tp: int
    cp: int
    pp: int
    dp: int
    ep: int


@dataclass(frozen=True)
class Plans:
    """Best split for each combination of parallel sizes, fastest first.

    left_out: number of splits that each rule has excluded
    examined: number of splits with a bound
    """

    request: PlanRequest
    options: tuple[Estimate, ...]
    left_out: Counter[str] = field(default_factory=Counter)
    examined: int = 0

    @property
    def best(self) -> Estimate:
        return self.options[0]

    @property
    def tensor_why(self) -> str:
        """One line on the tensor-parallel scheme of the best plan; empty where there was no choice."""
        chosen = _least(self.request, _plain(self.best.parallel))
        if chosen is None:
            return ""
        kept = (
            ""
            if chosen.placing.scheme == MEGATRONS or self.best.parallel.tp_scheme != MEGATRONS
            else (f"; its weights leave no memory, so {MEGATRONS} stays")
        )
        return f"of tensor-parallel schemes {chosen.why}{kept}"

    @property
    def experts_why(self) -> list[str]:
        """Lines on the ways of tokens to experts in the best plan, and on copies of experts; none for a dense model."""
        if not self.best.model.experts:
            return []
        rank, request = self.best.rank, self.request
        lines = dispatch_why(rank, request.exchanges, request.pieces), placement_why(rank)
        return [line for line in lines if line]

    @property
    def smaller(self) -> Estimate | None:
        """The plan of least memory that is as fast as the best one but much smaller; None if there is none."""
        most = MUCH_SMALLER * self.best.worst_memory.total
        near = [one for one in self.options if one.seconds <= (1 + AS_FAST) * self.best.seconds]
        least = min(near, key=lambda one: one.worst_memory.total)
        return least if least.worst_memory.total <= most else None

    @property
    def why(self) -> str:
        """One line on the bottleneck of the best plan, and on the reason why the second one is slower."""
        line = f"{label(self.best.parallel)} is bound by {self.best.bound_by}"
        if len(self.options) == 1:
            return line
        second = self.options[1]
        lost = {name: getattr(second.parts, name) - getattr(self.best.parts, name) for name in Parts._fields}
        most = max(lost, key=lambda name: lost[name])
        slower = second.seconds / self.best.seconds - 1
        if lost[most] <= 0:
            return f"{line}; {label(second.parallel)} is as fast"
        here, there = (getattr(one.parts, most) for one in (self.best, second))
        return (
            f"{line}; {label(second.parallel)} takes {100 * slower:.1f}% longer, most of it for {IN_WORDS[most]}: "
            f"{there:.3g} s a step against {here:.3g} s"
        )


def sequences(tokens: int, seq: int, gpus: int) -> int:
    """Return the sequences of a step of about `tokens` tokens, rounded so that many data-parallel ranks divide them.

    The result differs by at most a sixteenth from the exact quotient.
    """
    wanted = max(1, round(tokens / seq))
    # layers rarely divide by the odd part of the number of GPUs, so data parallelism must be able to use all of it
    odd = gpus // (gpus & -gpus)
    # the largest such number of ranks that has a multiple near enough
    for ranks in reversed([size for size in divisors(gpus) if size % odd == 0]):
        near = ranks * round(wanted / ranks)
        if near and abs(near - wanted) <= wanted / 16:
            return near
    return wanted


def label(parallel: Parallel) -> str:
    """Return a short text that names a split."""
    scheme = "" if parallel.tp_scheme == MEGATRONS else f" ({parallel.tp_scheme}"
    of_grid = f" {parallel.tp_grid[0]}x{parallel.tp_grid[1]}" if parallel.tp_grid else ""
    words = [f"TP={parallel.tp}" + (f"{scheme}{of_grid})" if scheme else "")]
    if parallel.cp > 1:
        grid = f" {parallel.grid.inner}x{parallel.grid.outer}" if parallel.grid else ""
        words.append(f"CP={parallel.cp} ({parallel.backend}{grid})")
    if parallel.pp > 1:
        chunks = f" v={parallel.vp}" if parallel.vp > 1 else ""
        words.append(f"PP={parallel.pp} ({parallel.schedule_name}{chunks})")
    of_tokens = f" ({parallel.dispatch})" if parallel.dispatch != STOCK else ""
    words += [f"DP={parallel.dp}"] + ([f"EP={parallel.ep}{of_tokens}"] if parallel.ep > 1 else [])
    words += [f"{parallel.slices} slices"] if parallel.slices > 1 else []
    words += [f"vocab parallel {parallel.barriers}"] if parallel.barriers else []
    words += [f"offload {parallel.moves.limit}"] if parallel.moves else []
    words += [f"micro batch {parallel.micro_batch}"] if parallel.micro_batch > 1 else []
    again = "full recompute" + (" but attention" if parallel.keep_attention else "")
    return " ".join(words + ([again] if parallel.recompute == "full" else []))


Progress = Callable[[float], None]


def search(request: PlanRequest, record: Record, top: int = 10, progress: Progress = lambda share: None) -> Plans:
    """Return the `top` fastest combinations of parallel sizes, each with its best split; a pure function.

    record:   makes traces of context-parallel loops, megatron_cp.context.trace.record.record
    progress: called with the share of the work that is done
    Raises ValueError for a number of GPUs that the cluster cannot have, for a cluster without rates of the products'
    dtype, and when no split fits, with the smallest number of GPUs on which one does.
    """
    _check(request)
    _check_fixed(request)
    left_out: Counter[str] = Counter()
    record = stretching(record)
    bounds = _bounds(request, left_out, lambda share: progress(share / 2))
    best: dict[RankSplit, Estimate] = {}
    for at, bound in enumerate(bounds):
        progress(0.5 + at / len(bounds) / 2)
        shown = sorted(one.seconds for one in best.values())[:top]
        if len(shown) == top and bound.seconds >= shown[-1]:
            break
        sizes = _sizes(bound.parallel)
        if sizes in best and bound.seconds >= best[sizes].seconds:
            continue
        found = _with_context(request, bound, record)
        if found is None:
            left_out["memory"] += 1
        elif sizes not in best or found.seconds < best[sizes].seconds:
            best[sizes] = found
    progress(1.0)
    if not best:
        raise ValueError(_nothing_fits(request, left_out, record))
    options = sorted(best.values(), key=lambda one: (one.seconds, _sizes(one.parallel)))[:top]
    return Plans(request, tuple(options), left_out, len(bounds))


def _check(request: PlanRequest) -> None:
    cluster, gpus = request.cluster, request.gpus
    cluster.gemm(request.precision)
    for barriers in request.barriers:
        check_barriers(barriers)
    if late := [name for name in request.schedules if PIPELINES.get(name).delay]:
        raise Refused(
            f"{late[0]} trains on weights that lack updates, so that its time says too little; leave it out, and "
            "estimate a recipe with it"
        )
    per_node = cluster.ranks_per_node
    if gpus > per_node and cluster.between is None:
        raise ValueError(
            f"{cluster.name} is one node of {per_node} GPUs, got {gpus}; ask for at most {per_node}, or take a cluster "
            f"of several nodes"
        )
    if gpus > per_node and gpus % per_node:
        below = gpus // per_node * per_node
        raise ValueError(
            f"{gpus} GPUs must be a whole number of nodes of {per_node}; ask for {below} or {below + per_node}"
        )


def _check_fixed(request: PlanRequest) -> None:
    fixed, gpus = request.fixed, request.gpus
    if not 0 <= request.headroom < 1:
        raise Refused(f"headroom is a share of a GPU's memory, from 0 to less than 1, got {request.headroom}")
    ranks = {name: size for name, size in fixed.given.items() if name in ("tp", "cp", "pp", "dp")}
    whole = prod(ranks.values())
    said = " x ".join(f"{name.upper()} {size}" for name, size in ranks.items())
    if gpus % whole or (len(ranks) == 4 and gpus != whole):
        raise Refused(
            f"{said} = {whole} ranks {'do not divide' if gpus % whole else 'are not'} {gpus} GPUs; change one"
        )
    if fixed.vp and fixed.vp > 1 and fixed.pp == 1:
        raise Refused(f"{fixed.vp} virtual stages need a pipeline, got PP 1; leave one of the two out")


def _sizes(parallel: Parallel) -> RankSplit:
    return RankSplit(parallel.tp, parallel.cp, parallel.pp, parallel.dp, parallel.ep)


def _bounds(request: PlanRequest, left_out: Counter[str], progress: Progress) -> list[Estimate]:
    """Return lower bounds of all splits whose memory may fit, fastest first."""
    bounds = []
    combinations = list(rank_splits(request, left_out))
    for at, sizes in enumerate(combinations):
        progress(at / len(combinations))
        for parallel in _splits(request, sizes):
            bound = _bound(request, parallel, left_out)
            bounds += [bound] if bound else []
    return sorted(bounds, key=lambda one: (one.seconds, _sizes(one.parallel)))


def rank_splits(request: PlanRequest, left_out: Counter[str]) -> Iterator[RankSplit]:
    """Yield all parallel sizes that Megatron's rules of divisibility and the fixed sizes allow."""
    fixed = request.fixed
    for tp in [fixed.tp] if fixed.tp else _powers(request.gpus):
        if request.gpus % tp:
            continue
        if reason := _tensor_rule(request, tp):
            left_out[reason] += 1
            continue
        for cp in [fixed.cp] if fixed.cp else _powers(request.gpus // tp):
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
            if dp * cp % ep == 0 and request.fixed.allow(ep=ep):
                yield RankSplit(tp, cp, pp, dp, ep)


def _splits(request: PlanRequest, sizes: RankSplit) -> Iterator[Parallel]:
    """Yield the splits with these parallel sizes, except the choices of recomputation and of context parallelism."""
    layers, fixed = request.model.layers, request.fixed
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
                        state_dir=request.state_dir,
                        state_weights=request.state_dir is not None,
                    ),
                )


def _dispatching(request: PlanRequest, parallel: Parallel) -> Parallel:
    """Return the split with the way of tokens to experts that takes least time."""
    rank = _rank(request, parallel)
    if not request.model.experts or rank.expert_ranks.all == 1:
        return parallel
    return replace(parallel, dispatch=weighed(rank, request.exchanges, request.pieces)[0].dispatch)


def _rank(request: PlanRequest, parallel: Parallel) -> RankConfig:
    return RankConfig(model=request.model, parallel=parallel, cluster=request.cluster, seq=request.seq)


def _schedules(request: PlanRequest, pp: int, vp: int) -> list[str | None]:
    if pp == 1:
        return [None]
    rules = map(PIPELINES.get, request.schedules)
    fitting = [rule.name for rule in rules if rule.chunks == vp or (rule.chunks is None and vp > 1)]
    return [None if name == megatrons_schedule(vp) else name for name in fitting]


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
        if rule.takes_vocabulary and not model.mtp and request.precision != "fp8":
            yield from ((name, 1, barriers) for barriers in request.barriers)


def _bound(request: PlanRequest, parallel: Parallel, left_out: Counter[str]) -> Estimate | None:
    """Return a lower bound of the split, with less memory if nothing else fits; None if its memory cannot fit."""
    if not _may_fit(request, parallel):
        left_out["memory"] += 1
        return None
    for level in _levels(request, parallel):
        try:
            bounds = [
                estimate_where_it_fits(request.model, one, request.cluster, request.seq, request.headroom)
                for one in level
            ]
        except ValueError:
            left_out["the schedule's rule for p, m and v"] += 1
            return None
        if fitting := [bound for bound in bounds if bound]:
            return min(fitting, key=lambda one: one.seconds)
    left_out["memory"] += 1
    return None


def _levels(request: PlanRequest, parallel: Parallel) -> list[list[Parallel]]:
    """Return the split as it is, and then what saves memory: activations on the host, and recomputation."""
    plain, saving = _schemes(request, parallel), []
    for one in plain:
        saving += _saving(request, one)
    return [plain, saving] if saving else [plain]


def _schemes(request: PlanRequest, parallel: Parallel) -> list[Parallel]:
    """Return the split with the tensor-parallel scheme whose linears take least, and as it is if that takes memory."""
    chosen = _least(request, parallel)
    if chosen is None or chosen.placing.scheme == MEGATRONS:
        return [replace(parallel, tp_overlap=request.tp_overlap and _may_overlap(parallel))]
    name, size = chosen.placing.scheme, chosen.placing.size
    if not SCHEMES.get(name).grid:
        return [replace(parallel, tp_scheme=name)]
    # the grid beside another axis of tokens is 2.5d
    deep = [entry.name for entry in SCHEMES if entry.depth and entry.name in request.tensor]
    name = deep[0] if deep and parallel.cp * parallel.dp > 1 else name
    return [replace(parallel, tp_scheme=name, tp_grid=(size.tokens, size.weights)), parallel]


def _may_overlap(parallel: Parallel) -> bool:
    """Return True if TransformerEngine's linears overlap in this split; then they delay no weight gradients."""
    return parallel.tp > 1 and parallel.sp and parallel.slices == 1 and not _delays(parallel)


def _delays(parallel: Parallel) -> bool:
    return parallel.schedule is not None and PIPELINES.get(parallel.schedule).split


def _least(request: PlanRequest, parallel: Parallel) -> Cheapest | None:
    """Return the scheme of those asked for whose linears take least; None where Megatron's own alone can run."""
    # a grid is 2d, and 2.5d where context or data parallelism is its depth
    deep = any(SCHEMES.get(name).depth for name in request.tensor) and parallel.cp * parallel.dp > 1
    among = {name for name in request.tensor if not SCHEMES.get(name).depth} | ({"2d"} if deep else set())
    if parallel.tp == 1 or among <= {MEGATRONS} or request.model.latent or request.precision == "fp8":
        return None
    rank = _rank(request, parallel)
    if rank.tokens % parallel.tp:
        return None
    moe = request.model.moe_layers == request.model.layers
    return cheapest(
        linears_of(rank, moe), parallel.tp, request.cluster, rank.dtype, split=_delays(parallel), among=among
    )


def _saving(request: PlanRequest, parallel: Parallel) -> list[Parallel]:
    saving = []
    # with two copies, and with a vocabulary on all ranks, activations do not move
    if request.offload and parallel.pp > 1 and parallel.copies == 1 and not parallel.barriers:
        name = parallel.schedule_name
        for limit in sorted({2, max(2, parallel.pp * parallel.vp // 2)}, reverse=True):
            saving.append(replace(parallel, schedule=name, moves=Offload(limit)))
    # our schedules split backwards, and would keep recomputed activations from input gradient to weight gradient
    if not parallel.schedule or (parallel.barriers and not _delays(parallel)):
        saving.append(replace(parallel, recompute="full"))
    return saving


def _may_fit(request: PlanRequest, parallel: Parallel) -> bool:
    """True if weights, gradients and optimizer of a middle stage fit; a quick test without a simulation."""
    if request.cluster.memory_bytes is None:
        return True
    layers = parallel.copies * request.model.layers / parallel.pp
    dense, experts = stage_parameters(request.model, parallel, layers, False, False)
    state = sum(parameter_bytes(parallel, dense, experts))
    return state + request.cluster.reserved_bytes < (1 - request.headroom) * request.cluster.memory_bytes


def _estimate(request: PlanRequest, parallel: Parallel, record: Record) -> Estimate:
    return estimate(request.model, parallel, request.cluster, request.seq, record)


def _with_context(request: PlanRequest, bound: Estimate, record: Record) -> Estimate | None:
    """Return the split with the fastest context parallelism that fits, saving memory only if nothing else fits."""
    plain, *saving = _levels(request, _plain(bound.parallel))
    for level in [plain, *saving] if bound.parallel in plain else saving:
        found = []
        for parallel in (there for one in level for there in _contexts(request, one)):
            try:
                found.append(_estimate(request, parallel, record))
            except ValueError:
                # a backend that refuses these heads or sizes
                continue
        fitting = [one for one in found if one.leaves(request.headroom)]
        if fitting:
            return min(fitting, key=lambda one: one.seconds)
    return None


def _plain(parallel: Parallel) -> Parallel:
    """Return the split without what saves memory, and with Megatron's own linears."""
    sliced = parallel.slices > 1
    if parallel.moves and not sliced and parallel.schedule == megatrons_schedule(parallel.vp):
        parallel = replace(parallel, schedule=None)
    return replace(parallel, recompute="none", moves=None, tp_scheme=MEGATRONS, tp_grid=None, tp_overlap=False)


def _contexts(request: PlanRequest, parallel: Parallel) -> Iterator[Parallel]:
    if parallel.cp == 1:
        yield parallel
        return
    for entry in map(BACKENDS.get, request.backends):
        if not entry.needs_grid:
            yield replace(parallel, backend=entry.name)
            continue
        # the inner axis must stay on the fast links inside a node
        room = request.cluster.ranks_per_node // parallel.tp
        for inner in divisors(parallel.cp)[1:-1]:
            if inner <= room:
                yield replace(parallel, backend=entry.name, grid=Grid(inner, parallel.cp // inner))


def _nothing_fits(request: PlanRequest, left_out: Counter[str], record: Record) -> str:
    rules = ", ".join(f"{name} ({count})" for name, count in left_out.most_common())
    fixed = request.fixed.given
    sizes = f" with {', '.join(f'{name.replace("_", " ")} {size}' for name, size in fixed.items())}" if fixed else ""
    line = (
        f"no split{sizes} of {request.model.name} with {request.seq:,} tokens and batches of {request.global_batch} "
        f"sequences fits on {request.gpus} GPUs of {request.cluster.name}; left out by: {rules or 'none'}"
    )
    enough = smallest(request, record)
    if enough is None:
        return f"{line}; no number of them can hold it"
    way_out = "" if enough > request.gpus else ", but not so many: ask for a number that layers or batch divide by"
    return f"{line}; {enough} GPUs can hold it{way_out}"


def smallest(request: PlanRequest, record: Record) -> int | None:
    """Return the smallest power of two of GPUs, up to 65536, on which a split with this batch fits; None if none."""
    most = 1 << 16 if request.cluster.between else min(1 << 16, request.cluster.ranks_per_node)
    return next(
        (gpus for gpus in _powers(1 << 16) if gpus <= most and _holds(replace(request, gpus=gpus), record)), None
    )


def _holds(request: PlanRequest, record: Record) -> bool:
    splits = (parallel for sizes in rank_splits(request, Counter()) for parallel in _splits(request, sizes))
    plain = (one for one in splits if one.vp == 1 and one.micro_batch == 1 and not one.schedule)
    bounds = (_bound(request, parallel, Counter()) for parallel in plain)
    return any(_with_context(request, bound, record) for bound in bounds if bound)


def _powers(most: int) -> list[int]:
    """Return the powers of two that divide `most`."""
    return [1 << at for at in range(most.bit_length()) if most % (1 << at) == 0]
