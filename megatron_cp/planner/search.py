"""Search the parallel sizes that train a model fastest on a number of GPUs of a cluster, by the estimator.

A branch-and-bound search: every split that Megatron's rules and the memory allow gets a lower bound, in which context
parallelism costs only its kernels. In the order of these bounds the splits are estimated with the traces of their
loops, until a bound is worse than all plans to show.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from megatron_cp.context.choose import Record
from megatron_cp.context.trace.stretch import stretching
from megatron_cp.planner.estimate import Estimate, estimate, estimate_where_it_fits
from megatron_cp.planner.parallel import Parallel
from megatron_cp.planner.plan_request import PlanRequest, check_request
from megatron_cp.planner.plans import Plans
from megatron_cp.planner.splits import RankSplit, powers, rank_splits, sizes_of, splits
from megatron_cp.planner.variants import contexts, levels, may_fit, without_savings

Progress = Callable[[float], None]


def search(request: PlanRequest, record: Record, top: int = 10, progress: Progress = lambda share: None) -> Plans:
    """Return the `top` fastest combinations of parallel sizes, each with its best split; a pure function.

    record:   makes traces of context-parallel loops, megatron_cp.context.trace.record.record
    progress: called with the share of the work that is done
    Raises ValueError for a number of GPUs that the cluster cannot have, for a cluster without rates of the products'
    dtype, and when no split fits, with the smallest number of GPUs on which one does.
    """
    check_request(request)
    left_out: Counter[str] = Counter()
    record = stretching(record)
    bounds = _bounds(request, left_out, lambda share: progress(share / 2))
    best: dict[RankSplit, Estimate] = {}
    for at, bound in enumerate(bounds):
        progress(0.5 + at / len(bounds) / 2)
        shown = sorted(one.seconds for one in best.values())[:top]
        if len(shown) == top and bound.seconds >= shown[-1]:
            break
        sizes = sizes_of(bound.parallel)
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
    options = sorted(best.values(), key=lambda one: (one.seconds, sizes_of(one.parallel)))[:top]
    return Plans(request, tuple(options), left_out, len(bounds))


def _bounds(request: PlanRequest, left_out: Counter[str], progress: Progress) -> list[Estimate]:
    """Return lower bounds of all splits whose memory may fit, fastest first."""
    bounds = []
    combinations = list(rank_splits(request, left_out))
    for at, sizes in enumerate(combinations):
        progress(at / len(combinations))
        for parallel in splits(request, sizes):
            bound = _bound(request, parallel, left_out)
            bounds += [bound] if bound else []
    return sorted(bounds, key=lambda one: (one.seconds, sizes_of(one.parallel)))


def _bound(request: PlanRequest, parallel: Parallel, left_out: Counter[str]) -> Estimate | None:
    """Return a lower bound of the split, with less memory if nothing else fits; None if its memory cannot fit."""
    if not may_fit(request, parallel):
        left_out["memory"] += 1
        return None
    for level in levels(request, parallel):
        try:
            bounds = [
                estimate_where_it_fits(request.model, one, request.cluster, request.seq, request.headroom)
                for one in level
            ]
        except ValueError:
            rule = ", or a flag of the recipe" if request.kept else ""
            left_out[f"the schedule's rule for p, m and v{rule}"] += 1
            return None
        if fitting := [bound for bound in bounds if bound]:
            return min(fitting, key=lambda one: one.seconds)
    left_out["memory"] += 1
    return None


def _with_context(request: PlanRequest, bound: Estimate, record: Record) -> Estimate | None:
    """Return the split with the fastest context parallelism that fits, saving memory only if nothing else fits."""
    plain, *saving = levels(request, without_savings(bound.parallel))
    for level in [plain, *saving] if bound.parallel in plain else saving:
        found = []
        for parallel in (there for one in level for there in contexts(request, one)):
            try:
                found.append(_estimate(request, parallel, record))
            except ValueError:
                # a backend that refuses these heads or sizes
                continue
        fitting = [one for one in found if one.leaves(request.headroom)]
        if fitting:
            return min(fitting, key=lambda one: one.seconds)
    return None


def _estimate(request: PlanRequest, parallel: Parallel, record: Record) -> Estimate:
    return estimate(request.model, parallel, request.cluster, request.seq, record)


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
        (gpus for gpus in powers(1 << 16) if gpus <= most and _holds(replace(request, gpus=gpus), record)), None
    )


def _holds(request: PlanRequest, record: Record) -> bool:
    found = (parallel for sizes in rank_splits(request, Counter()) for parallel in splits(request, sizes))
    plain = (one for one in found if one.vp == 1 and one.micro_batch == 1 and not one.schedule)
    bounds = (_bound(request, parallel, Counter()) for parallel in plain)
    return any(_with_context(request, bound, record) for bound in bounds if bound)
