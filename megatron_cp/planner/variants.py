"""Variants of a split: linears of tensor parallelism, backends of context parallelism, and what saves memory."""

from collections.abc import Iterator
from dataclasses import replace

from megatron_cp.context import BACKENDS
from megatron_cp.grid import Grid, divisors
from megatron_cp.pipeline import SCHEDULES as PIPELINES
from megatron_cp.pipeline.offload import Offload
from megatron_cp.planner.memory import parameter_bytes, stage_parameters
from megatron_cp.planner.parallel import Parallel, megatrons_schedule
from megatron_cp.planner.plan_request import PlanRequest
from megatron_cp.planner.splits import config_of
from megatron_cp.planner.work import linears_of
from megatron_cp.tensor import MEGATRONS, SCHEMES
from megatron_cp.tensor.cost import Cheapest, cheapest


def levels(request: PlanRequest, parallel: Parallel) -> list[list[Parallel]]:
    """Return the split as it is, and then what saves memory: activations on the host, and recomputation."""
    plain, saving = _schemes(request, parallel), []
    for one in plain:
        saving += _saving(request, one)
    return [plain, saving] if saving else [plain]


def _schemes(request: PlanRequest, parallel: Parallel) -> list[Parallel]:
    """Return the split with the tensor-parallel scheme whose linears take least, and as it is if that takes memory."""
    chosen = cheapest_scheme(request, parallel)
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


def cheapest_scheme(request: PlanRequest, parallel: Parallel) -> Cheapest | None:
    """Return the scheme of those asked for whose linears take least; None where Megatron's own alone can run."""
    # a grid is 2d, and 2.5d where context or data parallelism is its depth
    deep = any(SCHEMES.get(name).depth for name in request.tensor) and parallel.cp * parallel.dp > 1
    among = {name for name in request.tensor if not SCHEMES.get(name).depth} | ({"2d"} if deep else set())
    if parallel.tp == 1 or among <= {MEGATRONS} or request.model.latent or request.precision == "fp8":
        return None
    rank = config_of(request, parallel)
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


def may_fit(request: PlanRequest, parallel: Parallel) -> bool:
    """True if weights, gradients and optimizer of a middle stage fit; a quick test without a simulation."""
    if request.cluster.memory_bytes is None:
        return True
    layers = parallel.copies * request.model.layers / parallel.pp
    dense, experts = stage_parameters(request.model, parallel, layers, False, False)
    state = sum(parameter_bytes(parallel, dense, experts))
    return state + request.cluster.reserved_bytes < (1 - request.headroom) * request.cluster.memory_bytes


def without_savings(parallel: Parallel) -> Parallel:
    """Return the split without what saves memory, and with Megatron's own linears."""
    sliced = parallel.slices > 1
    if parallel.moves and not sliced and parallel.schedule == megatrons_schedule(parallel.vp):
        parallel = replace(parallel, schedule=None)
    return replace(parallel, recompute="none", moves=None, tp_scheme=MEGATRONS, tp_grid=None, tp_overlap=False)


def contexts(request: PlanRequest, parallel: Parallel) -> Iterator[Parallel]:
    """Yield the split with each backend of context parallelism, and each grid where it needs one."""
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
