"""Estimate a training step on a cluster before it is run: seconds by kind, memory, traffic, MFU."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from megatron_cp.context.choose import Record
from megatron_cp.hardware.cluster import Cluster
from megatron_cp.planner.checks import check
from megatron_cp.planner.memory import MemoryUse
from megatron_cp.planner.model import Transformer
from megatron_cp.planner.parallel import Parallel
from megatron_cp.planner.pipelining import makespan, memory_of
from megatron_cp.planner.replicas import data_and_optimizer
from megatron_cp.planner.stages import Stage, of_ranks, stages_of
from megatron_cp.planner.traffic import StepTraffic, step_traffic
from megatron_cp.planner.vocabulary import head_times
from megatron_cp.planner.work import RankConfig, Seconds, placed


class Parts(NamedTuple):
    """Seconds of a step on its slowest pipeline rank, by kind; the first five as in `Seconds`.

    pipeline:  idle, or waiting for other pipeline ranks
    data:      reduction of gradients and gathering of weights that no computation hides
    optimizer: its passes over memory and over its state in files, and the time of a step beside its work on tensors
    """

    products: float
    attention: float
    memory: float
    context: float
    collectives: float
    pipeline: float
    data: float
    optimizer: float

    @property
    def total(self) -> float:
        return sum(self)


IN_WORDS = {
    "products": "matrix products",
    "attention": "attention kernels",
    "memory": "passes over memory",
    "context": "copies and waits of context parallelism",
    "collectives": "collectives of tensor and expert parallelism",
    "pipeline": "waiting in the pipeline",
    "data": "gradient reduction and weight gathering",
    "optimizer": "the optimizer",
}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One training step of a model, spread over a cluster.

    parts:   of the slowest pipeline rank; their sum is the step
    memory:  of each pipeline rank
    traffic: of a rank of the fullest pipeline stage
    """

    model: Transformer
    parallel: Parallel
    cluster: Cluster
    seq: int
    parts: Parts
    memory: tuple[MemoryUse, ...]
    traffic: StepTraffic

    @property
    def rank(self) -> RankConfig:
        """Inputs that determine the work of a rank, without traces."""
        return RankConfig(model=self.model, parallel=self.parallel, cluster=self.cluster, seq=self.seq)

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return self.parts.total

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of all ranks together."""
        return self.parallel.global_batch * self.seq / self.seconds

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return self.tokens_per_s / self.parallel.world

    def flops_per_gpu(self, causal: Fraction = Fraction(1, 2)) -> float:
        """Return the model's operations per second and rank, as Megatron's --log-throughput counts them."""
        return self.model.flops(self.seq, self.parallel.global_batch, causal) / self.seconds / self.parallel.world

    @property
    def mfu(self) -> float:
        """Share of the peak of the products' dtype that the model's operations reach, recomputation left out."""
        return self.flops_per_gpu() / self.cluster.gemm(self.parallel.precision).peak

    @property
    def worst_memory(self) -> MemoryUse:
        """Memory of the fullest rank."""
        return max(self.memory, key=lambda memory: memory.total)

    @property
    def fits(self) -> bool:
        """True if the step fits the fullest rank's memory, or if the cluster does not state a memory size."""
        return self.leaves(0.0)

    def leaves(self, headroom: float) -> bool:
        """Return True if the fullest rank leaves this share of its memory free, or if no memory size is stated."""
        return _held(self.cluster, self.memory, headroom)

    @property
    def bound_by(self) -> str:
        """Kind of work that takes most of the step, in words."""
        most = max(Parts._fields, key=lambda name: getattr(self.parts, name))
        return IN_WORDS[most]


def estimate(
    model: Transformer, parallel: Parallel, cluster: Cluster, seq: int, record: Record | None = None
) -> Estimate:
    """Estimate a step of `model` on sequences of `seq` tokens; a pure function of its arguments.

    record: makes traces of context-parallel loops (megatron_cp.context.trace.record.record); without it only their
            kernels are counted, so that the step is a lower bound for every backend
    Raises ValueError for sizes that do not divide, for a cluster without rates of matrix products, and for a run that
    the backend or the schedule refuses.
    """
    check(model, parallel, seq)
    rank = placed(RankConfig(model=model, parallel=parallel, cluster=cluster, seq=seq, record=record))
    stages = stages_of(rank)
    return _timed(rank, stages, memory_of(rank, stages))


def estimate_where_it_fits(
    model: Transformer, parallel: Parallel, cluster: Cluster, seq: int, headroom: float = 0.0
) -> Estimate | None:
    """Estimate without traces; None where memory does not suffice, which is found without the slow simulation.

    headroom: share of a rank's memory that stays free
    Raises ValueError as `estimate` does.
    """
    check(model, parallel, seq)
    rank = RankConfig(model=model, parallel=parallel, cluster=cluster, seq=seq)
    stages = stages_of(rank)
    memory = memory_of(rank, stages)
    return _timed(rank, stages, memory) if _held(cluster, memory, headroom) else None


def _timed(rank: RankConfig, stages: "Sequence[Stage]", memory: tuple[MemoryUse, ...]) -> Estimate:
    """Return the estimate of stages whose memory is known."""
    model, parallel, cluster, seq = rank.model, rank.parallel, rank.cluster, rank.seq
    each = of_ranks(rank, stages)
    seconds = makespan(rank, stages)
    slowest = max(range(parallel.pp), key=lambda at: each[at].seconds)
    spent = Seconds()
    for part in (*each[slowest].work, *head_times(rank)):
        spent = spent.plus(part, parallel.micros)
    data, optimizer = max((data_and_optimizer(rank, stage, at) for at, stage in enumerate(each)), key=sum)
    # without a pipeline nothing waits; rounding of the sums must not show up as waiting
    waiting = max(0.0, seconds - spent.total) if parallel.pp > 1 else 0.0
    parts = Parts(*spent, waiting, data, optimizer + cluster.step_s)
    return Estimate(
        model=model,
        parallel=parallel,
        cluster=cluster,
        seq=seq,
        parts=parts,
        memory=memory,
        traffic=step_traffic(rank, each[slowest].layers / parallel.copies),
    )


def _held(cluster: Cluster, memory: Sequence[MemoryUse], headroom: float) -> bool:
    return cluster.memory_bytes is None or max(one.total for one in memory) <= (1 - headroom) * cluster.memory_bytes
