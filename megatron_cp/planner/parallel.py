"""Describe how a training run is spread over ranks: Megatron's parallel sizes and related choices."""

from dataclasses import dataclass

from megatron_cp.context import BACKENDS, DEFAULT
from megatron_cp.dtypes import BYTES, TRAINING
from megatron_cp.grid import Grid
from megatron_cp.hardware.cluster import Cluster
from megatron_cp.hardware.cluster_file import load_cluster, shipped_clusters
from megatron_cp.pipeline import SCHEDULES
from megatron_cp.recipe.command import processes
from megatron_cp.recipe.recipe import Recipe

RECOMPUTE = ("none", "selective", "full")
PRECISIONS = {"fp8": 2} | {name: BYTES[name] for name in TRAINING}
"""Bytes of a stored weight and activation; with fp8 only products are computed in fp8, tensors are kept in bfloat16."""


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """Parallel sizes, batch and memory choices of a run, under Megatron's names.

    vp:          model chunks per pipeline rank
    backend, grid, placement: of context parallelism, as --cp-comm-type, --hierarchical-context-parallel-sizes and
                 --cp-placement say them
    sp:          sequence parallelism, the norms' tokens spread over the tensor-parallel ranks
    micro_batch, global_batch: samples
    recompute:   "none", "selective" (core attention) or "full" (whole layers, all of them)
    schedule:    of the pipeline; None for Megatron's own, interleaved where vp > 1
    objective:   "makespan", or "span" where each pipeline rank steps its optimizer on its own (arXiv:2401.10241, 4)
    balanced_ends: the embedding and the loss count as layers when layers are divided among stages
    overlap_grad_reduce, overlap_param_gather, tp_overlap: as Megatron's flags; tp_overlap is TransformerEngine's
    overlap_p2p: the interleaved schedule sends beside its computation; otherwise each pass waits for its messages
    fp8_params:  weights are kept and gathered in fp8 alone
    fp32_grads:  gradients are accumulated and reduced in float32
    flash:       attention by a fused kernel; without it whole score matrices are written
    """

    tp: int = 1
    pp: int = 1
    vp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1
    backend: str = DEFAULT
    grid: Grid | None = None
    placement: str = "head-first"
    sp: bool = False
    micro_batch: int = 1
    global_batch: int = 1
    distributed_optimizer: bool = True
    recompute: str = "none"
    schedule: str | None = None
    objective: str = "makespan"
    balanced_ends: bool = False
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True
    tp_overlap: bool = False
    overlap_p2p: bool = True
    fsdp: bool = False
    fp8_params: bool = False
    fp32_grads: bool = True
    flash: bool = True
    precision: str = "bfloat16"

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "vp", "cp", "dp", "ep", "micro_batch", "global_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.recompute not in RECOMPUTE:
            raise ValueError(f"recompute must be one of {', '.join(RECOMPUTE)}, got {self.recompute!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.global_batch % (self.dp * self.micro_batch):
            raise ValueError(
                f"global batch {self.global_batch} must be a multiple of data parallel {self.dp} x micro batch "
                f"{self.micro_batch}; change one of them"
            )
        if self.dp * self.cp % self.ep:
            raise ValueError(f"expert parallel {self.ep} must divide data parallel x context parallel")
        BACKENDS.get(self.backend)
        SCHEDULES.get(self.schedule_name)

    @property
    def world(self) -> int:
        """Number of ranks of the run."""
        return self.tp * self.cp * self.dp * self.pp

    @property
    def micros(self) -> int:
        """Microbatches that a rank sees in a step."""
        return self.global_batch // (self.dp * self.micro_batch)

    @property
    def bytes(self) -> int:
        """Bytes of one stored weight or activation."""
        return PRECISIONS[self.precision]

    @property
    def schedule_name(self) -> str:
        """The pipeline schedule, Megatron's own where none is named."""
        return self.schedule or megatrons_schedule(self.vp)


def megatrons_schedule(chunks: int) -> str:
    """Return the schedule that Megatron runs for so many model chunks per pipeline rank."""
    return "interleaved" if chunks > 1 else "1f1b"


def parallel_of(recipe: Recipe, layers: int) -> Parallel:
    """Return how a recipe spreads its model; raises ValueError with flag and place for a size that is invalid."""
    given = recipe.model_args
    sizes = {
        name: recipe.number(f"--{flag}-parallel-size", 1)
        for name, flag in {"tp": "tensor-model", "pp": "pipeline-model", "cp": "context", "ep": "expert-model"}.items()
    }
    world = processes(recipe)
    if world is None:
        raise ValueError(
            "--nproc-per-node and --nnodes must be numbers; what torchrun finds on a node is not known here"
        )
    rest, odd = divmod(world, sizes["tp"] * sizes["pp"] * sizes["cp"])
    if odd or not rest:
        raise ValueError(
            f"{world} processes must be a multiple of tensor {sizes['tp']} x pipeline {sizes['pp']} x context "
            f"{sizes['cp']}; change --nproc-per-node or --nnodes, or a parallel size"
        )
    micro = recipe.number("--micro-batch-size", 1)
    return Parallel(
        tp=sizes["tp"],
        pp=sizes["pp"],
        vp=_chunks(recipe, layers, sizes["pp"]),
        cp=sizes["cp"],
        ep=sizes["ep"],
        dp=rest,
        backend=BACKENDS.get(recipe.flag("--cp-comm-type", "p2p").split()[0]).name,
        grid=_grid(recipe),
        placement=recipe.flag("--cp-placement", "head-first"),
        sp="--sequence-parallel" in given,
        micro_batch=micro,
        global_batch=recipe.number("--global-batch-size", micro * rest),
        distributed_optimizer="--use-distributed-optimizer" in given,
        recompute=recipe.flag("--recompute-granularity", _recompute_by_default(recipe)),
        schedule=recipe.flag("--pp-schedule", "") or None,
        balanced_ends="--account-for-loss-in-pipeline-split" in given,
        overlap_grad_reduce="--overlap-grad-reduce" in given,
        overlap_param_gather="--overlap-param-gather" in given,
        tp_overlap="--tp-comm-overlap" in given,
        overlap_p2p="--no-overlap-p2p-communication" not in given,
        fsdp="--use-megatron-fsdp" in given,
        fp8_params="--fp8-param-gather" in given,
        # by default Megatron accumulates bf16 gradients in float32
        fp32_grads="--grad-reduce-in-bf16" not in given,
        precision=_precision(recipe),
    )


def _chunks(recipe: Recipe, layers: int, pp: int) -> int:
    given = recipe.model_args
    if "--num-virtual-stages-per-pipeline-rank" in given:
        return recipe.number("--num-virtual-stages-per-pipeline-rank", 1)
    if "--num-layers-per-virtual-pipeline-stage" in given:
        ends = sum(f"--account-for-{end}-in-pipeline-split" in given for end in ("embedding", "loss"))
        return max(1, (layers + ends) // pp // recipe.number("--num-layers-per-virtual-pipeline-stage", 1))
    if "--pp-schedule" in given and pp > 1:
        # as in training: the chunks follow where the schedule knows one number only
        return SCHEDULES.get(recipe.flag("--pp-schedule", "")).chunks or 1
    return 1


def _recompute_by_default(recipe: Recipe) -> str:
    return "selective" if "--recompute-activations" in recipe.model_args else "none"


def _grid(recipe: Recipe) -> Grid | None:
    sizes = recipe.flag("--hierarchical-context-parallel-sizes", "").split()
    if not sizes:
        return None
    if len(sizes) != 2 or not all(size.isdecimal() for size in sizes):
        raise ValueError(f"--hierarchical-context-parallel-sizes takes two ints, got {' '.join(sizes)!r}")
    return Grid(int(sizes[0]), int(sizes[1]))


def _precision(recipe: Recipe) -> str:
    if "--fp8-format" in recipe.model_args:
        return "fp8"
    if "--bf16" in recipe.model_args:
        return "bfloat16"
    return "float16" if "--fp16" in recipe.model_args else "float32"


def cluster_for(recipe: Recipe, name: str | None) -> Cluster:
    """Return the cluster called `name`, or else the recipe's own; raises ValueError where neither names one."""
    chosen = name or recipe.cluster
    if chosen is None:
        known = ", ".join(shipped_clusters())
        raise ValueError(f"recipe {recipe.name} names no CLUSTER; add one, or pass --cluster with one of: {known}")
    return load_cluster(chosen)
