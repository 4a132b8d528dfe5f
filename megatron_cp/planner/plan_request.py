"""Request of a search: a model, hardware, the sizes that are given and the choices to weigh."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

from megatron_cp.context import BACKENDS
from megatron_cp.errors import Refused
from megatron_cp.grid import divisors
from megatron_cp.hardware.cluster import Cluster
from megatron_cp.pipeline import SCHEDULES as PIPELINES
from megatron_cp.pipeline.vocabulary import check_barriers
from megatron_cp.planner.model import Transformer
from megatron_cp.planner.parallel import NOT_QUANTISED, QuantisedMessages
from megatron_cp.tensor import MEGATRONS

CONTEXT = tuple(entry.name for entry in BACKENDS if entry.capabilities.planned)
"""Default backends of a search, one for each kind of traffic."""

SCHEDULED = ("1f1b", "interleaved", "zb-h1", "izb")
"""Default schedules of a search."""

HEADROOM = 0.05
"""Default share of a GPU's memory that a plan leaves free: the largest error of the memory estimate."""


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
    kept:         fields of `Parallel` that every plan has, as the model's recipe has them
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
    kept: Mapping[str, Any] = field(default_factory=dict, hash=False)
    state_dir: str | None = None
    fixed: FixedSizes = ANY_SIZES
    headroom: float = HEADROOM


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


def check_request(request: PlanRequest) -> None:
    """Raise ValueError for a number of GPUs, sizes or schedules that no search has, with a way out."""
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
    _check_fixed(request)


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
