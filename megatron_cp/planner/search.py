"""Which parallel sizes train a model fastest on so many GPUs of a cluster, by the estimator, and why.

Every split that Megatron's rules and the memory allow is bounded from below, its context parallelism costing its
kernels alone. In the order of these bounds the splits are estimated with the traces of their loops, until a bound is
worse than everything that would be shown.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from megatron_cp.context.choose import Record
from megatron_cp.context.trace.stretch import stretching
from megatron_cp.grid import Grid, divisors
from megatron_cp.hardware.cluster import Cluster
from megatron_cp.pipeline import SCHEDULES
from megatron_cp.planner.estimate import IN_WORDS, Estimate, Parts, estimate, estimate_where_it_fits
from megatron_cp.planner.memory import parameter_bytes, stage_parameters
from megatron_cp.planner.model import Transformer
from megatron_cp.planner.parallel import Parallel, megatrons_schedule

CONTEXT = ("zigzag", "all-gather", "ulysses", "usp")
"""Backends that are weighed where none are named: the classics, one of each kind of traffic."""

SCHEDULED = ("1f1b", "interleaved", "zb-h1", "izb")
"""Schedules that are weighed where none are named."""

CHUNKS = (1, 2, 4, 8)
MICRO_BATCHES = (1, 2, 4, 8)
MOST_TOKENS = 65536
"""Of a microbatch on a rank; products are as fast long before, and activations only grow."""


@dataclass(frozen=True)
class PlanRequest:
    """What is to be trained on what.

    global_batch: sequences of a step
    """

    model: Transformer
    seq: int
    gpus: int
    cluster: Cluster
    global_batch: int
    precision: str = "bfloat16"
    backends: tuple[str, ...] = CONTEXT
    schedules: tuple[str, ...] = SCHEDULED


class RankSplit(NamedTuple):
    """How ranks are dealt; splits that differ in the rest only are one line of a plan."""

    tp: int
    cp: int
    pp: int
    dp: int
    ep: int


@dataclass(frozen=True)
class Plans:
    """The best split of each dealing of ranks, fastest first.

    left_out: how many dealings or splits each rule has left out
    examined: how many splits were bounded
    """

    request: PlanRequest
    options: tuple[Estimate, ...]
    left_out: Counter[str] = field(default_factory=Counter)
    examined: int = 0

    @property
    def best(self) -> Estimate:
        return self.options[0]

    @property
    def why(self) -> str:
        """One line: what bounds the winner, and where the runner-up loses if there is one."""
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
    """Sequences of a step with so many tokens: up to a sixteenth more or fewer where that suits more ranks.

    What is odd in the number of ranks counts most: layers divide by it less often than by two.
    """
    wanted = max(1, round(tokens / seq))
    odd = gpus // (gpus & -gpus)
    for ranks in reversed([size for size in divisors(gpus) if size % odd == 0]):
        near = ranks * round(wanted / ranks)
        if near and abs(near - wanted) <= wanted / 16:
            return near
    return wanted


def label(parallel: Parallel) -> str:
    """A split in a few words."""
    words = [f"TP={parallel.tp}"]
    if parallel.cp > 1:
        grid = f" {parallel.grid.inner}x{parallel.grid.outer}" if parallel.grid else ""
        words.append(f"CP={parallel.cp} ({parallel.backend}{grid})")
    if parallel.pp > 1:
        chunks = f" v={parallel.vp}" if parallel.vp > 1 else ""
        words.append(f"PP={parallel.pp} ({parallel.schedule_name}{chunks})")
    words += [f"DP={parallel.dp}"] + ([f"EP={parallel.ep}"] if parallel.ep > 1 else [])
    words += [f"micro batch {parallel.micro_batch}"] if parallel.micro_batch > 1 else []
    return " ".join(words + (["full recompute"] if parallel.recompute == "full" else []))


Progress = Callable[[float], None]


def search(request: PlanRequest, record: Record, top: int = 10, progress: Progress = lambda share: None) -> Plans:
    """The `top` fastest dealings of ranks, each with its best split; a pure function of its arguments.

    record:   makes traces of context-parallel loops, megatron_cp.context.trace.record.record
    progress: told the share of the work that is done
    Raises ValueError for GPUs that the cluster cannot have, for one without rates of the products' dtype, and when
    nothing fits, with the smallest number of GPUs on which something does.
    """
    _check(request)
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
    per_node = cluster.ranks_per_node
    if gpus > per_node and cluster.between is None:
        raise ValueError(
            f"{cluster.name} is one node of {per_node} GPUs, got {gpus}; ask for at most {per_node}, or take a cluster "
            f"of several nodes"
        )
    if gpus > per_node and gpus % per_node:
        below = gpus // per_node * per_node
        raise ValueError(
            f"{gpus} GPUs are no whole number of nodes of {per_node}; ask for {below} or {below + per_node}"
        )


def _sizes(parallel: Parallel) -> RankSplit:
    return RankSplit(parallel.tp, parallel.cp, parallel.pp, parallel.dp, parallel.ep)


def _bounds(request: PlanRequest, left_out: Counter[str], progress: Progress) -> list[Estimate]:
    """Lower bounds of all splits whose memory may fit, fastest first."""
    bounds = []
    dealings = list(dealt(request, left_out))
    for at, sizes in enumerate(dealings):
        progress(at / len(dealings))
        for parallel in _splits(request, sizes):
            bound = _bound(request, parallel, left_out)
            bounds += [bound] if bound else []
    return sorted(bounds, key=lambda one: (one.seconds, _sizes(one.parallel)))


def dealt(request: PlanRequest, left_out: Counter[str]) -> Iterator[RankSplit]:
    """All dealings of the ranks that Megatron's rules of divisibility allow."""
    for tp in _powers(request.gpus):
        if reason := _tensor_rule(request, tp):
            left_out[reason] += 1
            continue
        for cp in _powers(request.gpus // tp):
            if cp > 1 and request.seq % (2 * cp):
                left_out["sequence divisible by twice CP"] += 1
                continue
            yield from _deal_rest(request, tp, cp, left_out)


def _tensor_rule(request: PlanRequest, tp: int) -> str:
    model = request.model
    if tp > request.cluster.ranks_per_node:
        return "tensor parallel inside a node"
    if model.heads % tp or model.ffn % tp or max(model.kv_heads, tp) % min(model.kv_heads, tp):
        return "heads, query groups and MLP width divisible by TP"
    return ""


def _deal_rest(request: PlanRequest, tp: int, cp: int, left_out: Counter[str]) -> Iterator[RankSplit]:
    model = request.model
    for pp in divisors(request.gpus // (tp * cp)):
        if pp > model.layers or (model.layers % pp and (model.layers + 2) % pp):
            left_out["layers divisible by PP"] += 1
            continue
        dp = request.gpus // (tp * cp * pp)
        if request.global_batch % dp:
            left_out["batch divisible by DP"] += 1
            continue
        for ep in divisors(model.experts) if model.experts else [1]:
            if dp * cp % ep == 0:
                yield RankSplit(tp, cp, pp, dp, ep)


def _splits(request: PlanRequest, sizes: RankSplit) -> Iterator[Parallel]:
    """The choices that a dealing leaves open, less recomputation and context parallelism."""
    layers = request.model.layers
    for micro in MICRO_BATCHES:
        if request.global_batch % (sizes.dp * micro):
            continue
        if micro > 1 and micro * request.seq // sizes.cp > MOST_TOKENS:
            continue
        for vp in CHUNKS if sizes.pp > 1 else (1,):
            stages = sizes.pp * vp
            if layers % stages and (layers + 2) % stages:
                continue
            for schedule in _schedules(request, sizes.pp, vp):
                yield Parallel(
                    **sizes._asdict(),
                    vp=vp,
                    sp=sizes.tp > 1,
                    micro_batch=micro,
                    global_batch=request.global_batch,
                    schedule=schedule,
                    balanced_ends=layers % stages != 0,
                    precision=request.precision,
                )


def _schedules(request: PlanRequest, pp: int, vp: int) -> list[str | None]:
    if pp == 1:
        return [None]
    rules = map(SCHEDULES.get, request.schedules)
    fitting = [rule.name for rule in rules if rule.chunks == vp or (rule.chunks is None and vp > 1)]
    return [None if name == megatrons_schedule(vp) else name for name in fitting]


def _bound(request: PlanRequest, parallel: Parallel, left_out: Counter[str]) -> Estimate | None:
    """The fastest estimate without context parallelism's own cost whose memory may fit: with recomputation at need."""
    if not _may_fit(request, parallel):
        left_out["memory"] += 1
        return None
    for recompute in _recomputes(parallel):
        there = replace(parallel, recompute=recompute)
        try:
            found = estimate_where_it_fits(request.model, there, request.cluster, request.seq)
        except ValueError:
            left_out["the schedule's rule for p, m and v"] += 1
            return None
        if found:
            return found
    left_out["memory"] += 1
    return None


def _recomputes(parallel: Parallel) -> tuple[str, ...]:
    # what an input gradient has recomputed would have to stay until its weight gradient
    return ("none",) if parallel.schedule else ("none", "full")


def _may_fit(request: PlanRequest, parallel: Parallel) -> bool:
    """Whether weights, gradients and optimizer alone fit; said of a middle stage, without playing the schedule."""
    if request.cluster.memory_bytes is None:
        return True
    layers = request.model.layers / parallel.pp
    dense, experts = stage_parameters(request.model, parallel, layers, False, False)
    state = sum(parameter_bytes(parallel, dense, experts))
    return state + request.cluster.reserved_bytes < request.cluster.memory_bytes


def _estimate(request: PlanRequest, parallel: Parallel, record: Record) -> Estimate:
    return estimate(request.model, parallel, request.cluster, request.seq, record)


def _with_context(request: PlanRequest, bound: Estimate, record: Record) -> Estimate | None:
    """The fastest way to do the split's context parallelism that fits, recomputing only where nothing does without."""
    levels = _recomputes(bound.parallel)
    for recompute in levels[levels.index(bound.parallel.recompute) :]:
        found = []
        for parallel in _contexts(request, replace(bound.parallel, recompute=recompute)):
            try:
                found.append(_estimate(request, parallel, record))
            except ValueError:
                # the backend refuses these heads or sizes
                continue
        fitting = [one for one in found if one.fits]
        if fitting:
            return min(fitting, key=lambda one: one.seconds)
    return None


def _contexts(request: PlanRequest, parallel: Parallel) -> Iterator[Parallel]:
    from megatron_cp.context import BACKENDS

    if parallel.cp == 1:
        yield parallel
        return
    for entry in map(BACKENDS.get, request.backends):
        if not entry.needs_grid:
            yield replace(parallel, backend=entry.name)
            continue
        # the inner axis is there to stay on the fast links
        room = request.cluster.ranks_per_node // parallel.tp
        for inner in divisors(parallel.cp)[1:-1]:
            if inner <= room:
                yield replace(parallel, backend=entry.name, grid=Grid(inner, parallel.cp // inner))


def _nothing_fits(request: PlanRequest, left_out: Counter[str], record: Record) -> str:
    rules = ", ".join(f"{name} ({count})" for name, count in left_out.most_common())
    line = (
        f"no split of {request.model.name} with {request.seq:,} tokens and batches of {request.global_batch} "
        f"sequences fits on {request.gpus} GPUs of {request.cluster.name}; left out by: {rules}"
    )
    enough = smallest(request, record)
    if enough is None:
        return f"{line}; no number of them can hold it"
    way_out = "" if enough > request.gpus else ", but not so many: ask for a number that layers or batch divide by"
    return f"{line}; {enough} GPUs can hold it{way_out}"


def smallest(request: PlanRequest, record: Record) -> int | None:
    """The smallest power of two of GPUs, up to 65536, on which a split with this batch fits; None where none does."""
    most = 1 << 16 if request.cluster.between else min(1 << 16, request.cluster.ranks_per_node)
    return next(
        (gpus for gpus in _powers(1 << 16) if gpus <= most and _holds(replace(request, gpus=gpus), record)), None
    )


def _holds(request: PlanRequest, record: Record) -> bool:
    splits = (parallel for sizes in dealt(request, Counter()) for parallel in _splits(request, sizes))
    plain = (one for one in splits if one.vp == 1 and one.micro_batch == 1 and not one.schedule)
    bounds = (_bound(request, parallel, Counter()) for parallel in plain)
    return any(_with_context(request, bound, record) for bound in bounds if bound)


def _powers(most: int) -> list[int]:
    """Powers of two that divide `most`."""
    return [1 << at for at in range(most.bit_length()) if most % (1 << at) == 0]
