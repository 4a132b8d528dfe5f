"""Describe how a training run is spread over ranks: Megatron's parallel sizes and related choices."""

from dataclasses import dataclass
from typing import NamedTuple

from megatron_cp.context import BACKENDS, DEFAULT, PLACEMENTS
from megatron_cp.dtypes import BYTES, TRAINING
from megatron_cp.experts import EXCHANGES
from megatron_cp.experts.copies import NO_COPIES, ExpertCopies
from megatron_cp.experts.dispatch_cost import DISPATCHERS, STOCK, Dispatch
from megatron_cp.grid import Grid
from megatron_cp.hardware.cluster import Cluster
from megatron_cp.pipeline import SCHEDULES
from megatron_cp.pipeline.offload import Offload
from megatron_cp.registry import unknown
from megatron_cp.replicas import INT8, QUANTISATIONS, Quantisation
from megatron_cp.tensor import DEFAULT_ENGINE, MEGATRONS
from megatron_cp.tensor import SCHEMES as TENSOR_SCHEMES
from megatron_cp.tensor.cost import Placing
from megatron_cp.tensor.place import grid_of

RECOMPUTE = ("none", "selective", "full")
SHARDINGS = ("no_shard", "optim", "optim_grads", "optim_grads_params")
"""Names of what Megatron-FSDP shards, as --data-parallel-sharding-strategy has them; torch's FSDP2 shards all."""
PRECISIONS = {"fp8": 2} | {name: BYTES[name] for name in TRAINING}
"""Bytes of a stored weight and activation; with fp8 only products are computed in fp8, tensors are kept in bfloat16."""


class QuantisedMessages(NamedTuple):
    """Messages of ZeRO++ that a run asks for, as --zero-quantized-gradients, -weights and -ranks-per-node say.

    ranks_per_node: of what the two hops take for nodes; None for the cluster's
    """

    gradients: str | None = None
    weights: bool = False
    ranks_per_node: int | None = None

    @property
    def asked(self) -> bool:
        """True if anything is quantised."""
        return self.gradients is not None or self.weights

    @property
    def of_gradients(self) -> Quantisation | None:
        """How gradients are quantised; None where they travel as ever."""
        return None if self.gradients is None else QUANTISATIONS.get(self.gradients)

    @property
    def of_weights(self) -> Quantisation | None:
        """How weights are quantised; None where they travel as ever."""
        return QUANTISATIONS.get(INT8) if self.weights else None


NOT_QUANTISED = QuantisedMessages()


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """Parallel sizes, batch and memory choices of a run, under Megatron's names.

    vp:          model chunks per pipeline rank
    backend, grid, placement: of context parallelism, as --cp-comm-type, --hierarchical-context-parallel-sizes and
                 --cp-placement say them
    sp:          sequence parallelism, the norms' tokens spread over the tensor-parallel ranks
    micro_batch, global_batch: samples
    etp:         tensor-parallel size of the experts; None for `tp`
    dispatch:    how tokens travel to experts and back
    expert_copies: of busy experts, in spare slots of other ranks
    recompute:   "none", "selective" (the modules of `recomputed`) or "full" (whole layers)
    recomputed:  Megatron's names of the modules that "selective" recomputes
    recompute_layers, recompute_method: of "full"; "block" recomputes so many layers of each stage, "uniform" all, and
                 keeps the input of each so many; None for each
    mlp_chunks, loss_chunks: of a rank's tokens in dense MLPs, and in output layer and loss, which backward computes
                 again one after the other; 1 and None for whole ones
    keep_attention: recomputation finds the output of attention kept, and repeats neither its forward nor its messages
    latent:      multi-latent attention sends its latents in the place of keys and values
    layout:      layers of each stage in the model's order; empty where they are divided evenly
    pp_placement: of the stages, for schedule "auto"; None for its own
    schedule:    of the pipeline; None for Megatron's own, interleaved where vp > 1
    moves:       limit of chunks on a pipeline rank, and where activations beyond it go
    slices:      of every sequence, which go through the pipeline one after the other
    free_running: pipeline ranks begin a step before the others have updated their weights, as --pp-free-running says it
    barriers:    of every microbatch, 1 or 2, where the vocabulary lies on all ranks of the pipeline; 0 elsewhere
    objective:   "makespan", or "span" where each pipeline rank steps its optimizer on its own (arXiv:2401.10241, 4)
    balanced_ends: the embedding and the loss count as layers when layers are divided among stages
    overlap_grad_reduce, overlap_param_gather, tp_overlap: as Megatron's flags; tp_overlap is TransformerEngine's
    tp_scheme, tp_grid, tp_engine: as --tp-comm-type, --tp-grid and --tp-engine say; None for the scheme's own grid
    overlap_p2p: the interleaved schedule sends beside its computation; otherwise each pass waits for its messages
    fsdp, sharding: what fully sharded data parallelism spreads, as --data-parallel-sharding-strategy says it
    instances:   groups of data-parallel and context-parallel ranks, each of which holds a whole of what is sharded
    local_steps: that instances take on their own between two averages of weights and moments; None where they add
                 their gradients in every step
    outer_bytes: of the outer optimizer per parameter of a rank's shard
    messages:    that are quantised between replicas
    fp8_params:  weights of linears are kept and gathered in fp8 alone
    fp32_grads:  gradients are accumulated and reduced in float32
    state_bytes: of the optimizer per parameter; None for float32 master weights and moments
    state_dir:   of the files that hold the optimizer's state, as --optimizer-state-dir says it
    state_weights: the float32 weights are in them too
    fused_merge: partial results of context parallelism are merged by our kernel where there is one, else by torch
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
    etp: int | None = None
    dispatch: Dispatch = STOCK
    expert_copies: ExpertCopies = NO_COPIES
    recompute: str = "none"
    recomputed: tuple[str, ...] = ("core_attn",)
    recompute_method: str = "uniform"
    recompute_layers: int = 1
    keep_attention: bool = False
    latent: bool = False
    mlp_chunks: int = 1
    loss_chunks: int | None = None
    layout: tuple[int, ...] = ()
    pp_placement: str | None = None
    schedule: str | None = None
    moves: Offload | None = None
    slices: int = 1
    free_running: bool = False
    barriers: int = 0
    objective: str = "makespan"
    balanced_ends: bool = False
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True
    tp_overlap: bool = False
    tp_scheme: str = MEGATRONS
    tp_grid: tuple[int, int] | None = None
    tp_engine: str = DEFAULT_ENGINE
    overlap_p2p: bool = True
    fsdp: bool = False
    sharding: str = SHARDINGS[-1]
    instances: int = 1
    local_steps: int | None = None
    outer_bytes: int = 0
    messages: QuantisedMessages = NOT_QUANTISED
    fp8_params: bool = False
    fp32_grads: bool = True
    state_bytes: float | None = None
    state_dir: str | None = None
    state_weights: bool = False
    fused_merge: bool = True
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
        if self.dp * self.cp * self.tp % (self.ep * self.expert_tp):
            within = "x tensor parallel " if self.etp else ""
            sizes = f"{self.ep} x {self.etp}" if self.etp else f"{self.ep}"
            raise ValueError(f"expert parallel {sizes} must divide data parallel x context parallel {within}".rstrip())
        if self.sharding not in SHARDINGS:
            raise ValueError(
                f"--data-parallel-sharding-strategy is one of {', '.join(SHARDINGS)}, got {self.sharding!r}"
            )
        if self.dp * self.cp % self.instances:
            raise ValueError(
                f"--num-distributed-optimizer-instances {self.instances} must divide data parallel x context parallel "
                f"= {self.dp * self.cp}"
            )
        if self.dp * self.cp * self.tp % (self.ep * self.expert_tp * self.instances):
            raise ValueError(
                f"--num-distributed-optimizer-instances {self.instances} must divide the "
                f"{self.dp * self.cp * self.tp // (self.ep * self.expert_tp)} ranks that hold the same experts; lower "
                f"it, or --expert-model-parallel-size {self.ep}"
            )
        if self.dispatch.dispatcher not in DISPATCHERS:
            raise unknown("dispatcher", self.dispatch.dispatcher, DISPATCHERS)
        EXCHANGES.get(self.dispatch.comm_type)
        BACKENDS.get(self.backend)
        assert self.placing.size.grid.ranks == self.tp
        SCHEDULES.get(self.schedule_name)

    @property
    def placing(self) -> Placing:
        """How the linears of attention and MLPs are placed on the tensor-parallel ranks."""
        asked = self.tp_grid and [str(size) for size in self.tp_grid]
        return Placing(self.tp_scheme, grid_of(TENSOR_SCHEMES.get(self.tp_scheme), self.tp, asked), self.tp_engine)

    @property
    def world(self) -> int:
        """Number of ranks of the run."""
        return self.tp * self.cp * self.dp * self.pp

    @property
    def micros(self) -> int:
        """Microbatches that a rank sees in a step."""
        return self.global_batch // (self.dp * self.micro_batch)

    @property
    def expert_tp(self) -> int:
        """Tensor-parallel size of the experts."""
        return self.etp or self.tp

    @property
    def shards(self) -> int:
        """Ranks that what is sharded is spread over."""
        return self.dp * self.cp // self.instances

    @property
    def expert_shards(self) -> int:
        """Ranks that experts which are sharded are spread over: of one instance, those that hold the same ones."""
        return self.dp * self.cp * self.tp // (self.ep * self.expert_tp * self.instances)

    def is_sharded(self, kind: str) -> bool:
        """Return True where FSDP shards "optim", "grads" or "params"."""
        return kind in self.sharding.split("_")

    @property
    def bytes(self) -> int:
        """Bytes of one stored weight or activation."""
        return PRECISIONS[self.precision]

    @property
    def attends_again(self) -> bool:
        """True if a recomputation repeats the forward of attention with what it sends."""
        again = self.recompute == "full" or (self.recompute == "selective" and "core_attn" in self.recomputed)
        return again and not self.keep_attention

    def recomputes_mlp(self, moe: bool) -> bool:
        """Return True if backward computes an MLP, dense or of experts, again."""
        named = self.recompute == "selective" and ("moe" if moe else "mlp") in self.recomputed
        return named or (self.frees_mlp_chunks and not moe)

    @property
    def frees_mlp_chunks(self) -> bool:
        """True if dense MLPs are computed again chunk by chunk; in FP8 all chunks are kept."""
        return self.mlp_chunks > 1 and self.precision != "fp8"

    @property
    def schedule_name(self) -> str:
        """The pipeline schedule, Megatron's own where none is named."""
        return self.schedule or megatrons_schedule(self.vp)

    @property
    def disk_bytes(self) -> int:
        """Bytes of the optimizer's state per parameter that are in files."""
        if self.state_dir is None:
            return 0
        return 12 if self.state_weights and self.precision != "float32" else 8

    @property
    def copies(self) -> int:
        """Copies of the model on the ranks of a pipeline; each rank holds a stage of every one."""
        return 2 if self.pp > 1 and SCHEDULES.get(self.schedule_name).two_copies else 1


def megatrons_schedule(chunks: int) -> str:
    """Return the schedule that Megatron runs for so many model chunks per pipeline rank."""
    return "interleaved" if chunks > 1 else "1f1b"


def warnings(parallel: Parallel, cluster: Cluster) -> list[str]:
    """Return a line for each choice that is allowed but rarely meant on this cluster."""
    grid, entry = parallel.grid, BACKENDS.get(parallel.backend)
    if grid is None or not entry.capabilities.placement:
        return []
    axis = PLACEMENTS[parallel.placement]
    # neighbours are the ranks of tensor parallelism, then those of the inner axis
    spanned = parallel.tp * max(grid.members(axis, 0)) + parallel.tp
    if spanned <= cluster.ranks_per_node:
        return []
    room = cluster.ranks_per_node // parallel.tp
    way_out = (
        f"take --hierarchical-context-parallel-sizes {room} {parallel.cp // room} with --cp-placement head-first"
        if room > 1 and parallel.cp % room == 0
        else f"lower --tensor-model-parallel-size, or take --cp-comm-type {DEFAULT}"
    )
    return [
        f"the {axis} axis of {entry.name} exchanges heads between nodes: it spans {spanned} ranks of TP {parallel.tp} "
        f"and CP {grid.inner} x {grid.outer}, a node has {cluster.ranks_per_node}; {way_out}"
    ]
