"""Describe how a training run is spread over ranks: Megatron's parallel sizes and related choices."""

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_cp.context import BACKENDS, DEFAULT, PLACEMENTS
from megatron_cp.dtypes import BYTES, TRAINING
from megatron_cp.errors import Refused
from megatron_cp.experts import AUTO as AUTO_GATHER
from megatron_cp.experts import EXCHANGES, NONE, TOKENS, TUTEL
from megatron_cp.experts import PLACEMENTS as EXPERT_PLACEMENTS
from megatron_cp.experts.copies import NO_COPIES, ExpertCopies
from megatron_cp.experts.dispatch_cost import ALLGATHER, ALLTOALL, DISPATCHERS, STOCK, Dispatch
from megatron_cp.grid import Grid
from megatron_cp.hardware.cluster import Cluster
from megatron_cp.hardware.cluster_file import load_cluster, shipped_clusters
from megatron_cp.pipeline import SCHEDULES
from megatron_cp.pipeline.offload import Offload, limit_of
from megatron_cp.pipeline.schedule import HOST
from megatron_cp.recipe.command import processes
from megatron_cp.recipe.recipe import Recipe
from megatron_cp.registry import unknown
from megatron_cp.replicas import AVERAGE, INT8, OUTERS, QUANTISATIONS, Quantisation
from megatron_cp.replicas.sync_steps import phases_of
from megatron_cp.tensor import AUTO, DEFAULT_ENGINE, FLUX, MEGATRONS
from megatron_cp.tensor import SCHEMES as TENSOR_SCHEMES
from megatron_cp.tensor.cost import Placing
from megatron_cp.tensor.place import AUTO_ENGINE, engine_of, grid_of
from megatron_cp.units import is_whole

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
    backend = recipe.flag("--cp-comm-type", "p2p")
    scheme, overlap = _tensor_scheme(recipe, sizes["tp"])
    return Parallel(
        tp=sizes["tp"],
        pp=sizes["pp"],
        vp=_chunks(recipe, layers, sizes["pp"]),
        cp=sizes["cp"],
        ep=sizes["ep"],
        dp=rest,
        # one for all layers, or one for each; white space alone is no name
        backend=BACKENDS.get(next(iter(backend.split()), backend)).name,
        grid=_grid(recipe),
        sp="--sequence-parallel" in given,
        micro_batch=micro,
        global_batch=recipe.number("--global-batch-size", micro * rest),
        distributed_optimizer="--use-distributed-optimizer" in given,
        dispatch=_dispatch(recipe),
        recompute=recipe.flag("--recompute-granularity", _recompute_by_default(recipe)),
        recomputed=tuple(recipe.flag("--recompute-modules", "core_attn").split()),
        recompute_method=recipe.flag("--recompute-method", "uniform"),
        recompute_layers=recipe.number("--recompute-num-layers", 1),
        layout=_layout(recipe, layers, sizes["pp"]),
        pp_placement=recipe.flag("--pp-placement", "") or None,
        schedule=recipe.flag("--pp-schedule", "") or None,
        moves=_moves(recipe),
        slices=recipe.number("--pp-slices", 1),
        free_running="--pp-free-running" in given,
        barriers=recipe.number("--pp-vocab-parallel", 1) if "--pp-vocab-parallel" in given else 0,
        balanced_ends="--account-for-loss-in-pipeline-split" in given,
        overlap_grad_reduce="--overlap-grad-reduce" in given,
        overlap_param_gather="--overlap-param-gather" in given,
        tp_overlap=overlap,
        tp_scheme=scheme,
        tp_grid=_tensor_grid(recipe, sizes["tp"]),
        tp_engine=engine_of(recipe.flag("--tp-engine", AUTO_ENGINE)),
        messages=_messages_of_run(recipe),
        precision=_precision(recipe),
        **extras_of(recipe),
    )


def extras_of(recipe: Recipe) -> dict[str, Any]:
    """Return the fields of `Parallel` that depend neither on parallel sizes nor on the order of a pipeline."""
    given = recipe.model_args
    return {
        "placement": recipe.flag("--cp-placement", "head-first"),
        "etp": recipe.number("--expert-tensor-parallel-size", 1) if "--expert-tensor-parallel-size" in given else None,
        "expert_copies": expert_copies_of(recipe),
        "keep_attention": "--cp-keep-attention" in given,
        "latent": "--cp-latent" in given,
        "mlp_chunks": recipe.number("--mlp-chunks-for-training", 1),
        "loss_chunks": recipe.number("--cp-loss-chunks", 1) if "--cp-loss-chunks" in given else None,
        "overlap_p2p": "--no-overlap-p2p-communication" not in given,
        "fsdp": bool({"--use-megatron-fsdp", "--use-torch-fsdp2"} & set(given)),
        "sharding": recipe.flag("--data-parallel-sharding-strategy", SHARDINGS[-1]),
        "instances": recipe.number("--num-distributed-optimizer-instances", 1),
        "local_steps": _local_steps(recipe),
        "outer_bytes": 8 if OUTERS.get(recipe.flag("--local-sgd-outer", AVERAGE)).remembers else 0,
        "fp8_params": "--fp8-param-gather" in given,
        "fp32_grads": _fp32_grads(recipe),
        "state_bytes": _state_bytes(recipe),
        "state_dir": recipe.flag("--optimizer-state-dir", "") or None,
        "state_weights": "--optimizer-state-weights" in given,
    }


def _dispatch(recipe: Recipe) -> Dispatch:
    """Return how tokens travel to experts; as in a run, ours, pieces and copies imply the dispatcher alltoall."""
    if "--num-experts" not in recipe.model_args:
        return STOCK
    exchange, pieces = EXCHANGES.get(recipe.flag("--moe-comm-type", STOCK.comm_type)), recipe.number("--moe-pieces", 1)
    found = Dispatch(
        recipe.flag("--moe-token-dispatcher-type", ALLGATHER),
        STOCK.comm_type if exchange.name == TUTEL else exchange.name,
        pieces if pieces > 1 else exchange.pieces,
        recipe.number("--moe-ranks-per-node", 0) or None,
        recipe.number("--moe-group-ranks", 0) or None,
    )
    found = found._replace(gather=_gather(recipe, exchange.name == TUTEL))
    ours = exchange.name != STOCK.comm_type or found.pieces > 1 or found.gather != TOKENS
    ours = ours or expert_copies_of(recipe).asked
    return found._replace(dispatcher=ALLTOALL) if ours and found.dispatcher == ALLGATHER else found


def _gather(recipe: Recipe, chosen: bool) -> str:
    """Return what ranks that share each expert gather; where a run chooses, it is transformer-engine that does not."""
    if recipe.number("--expert-tensor-parallel-size", recipe.number("--tensor-model-parallel-size", 1)) == 1:
        return TOKENS
    local = recipe.flag("--transformer-impl", "transformer_engine") == "local"
    return recipe.flag("--moe-gather", AUTO_GATHER if chosen and local else TOKENS)


def expert_copies_of(recipe: Recipe) -> ExpertCopies:
    """Return the copies of experts that a recipe asks for."""
    policy = recipe.flag("--moe-placement", NONE)
    if policy == NONE or "--num-experts" not in recipe.model_args:
        return NO_COPIES
    return ExpertCopies(
        EXPERT_PLACEMENTS.get(policy).name,
        recipe.number("--moe-replica-slots", NO_COPIES.slots),
        recipe.flag("--moe-cluster", NO_COPIES.cluster),
        int(recipe.flag("--moe-copies-ahead", str(NO_COPIES.ahead)) != "0"),
    )


def _tensor_scheme(recipe: Recipe, ranks: int) -> tuple[str, bool]:
    """Return the scheme of tensor parallelism, and True where it is transformer-engine's linears that overlap.

    As in a run, flux stands in for --tp-comm-overlap beside --transformer-impl local.
    """
    scheme, overlap = recipe.flag("--tp-comm-type", MEGATRONS), "--tp-comm-overlap" in recipe.model_args
    if not overlap or recipe.flag("--transformer-impl", "transformer_engine") != "local":
        return scheme, overlap and scheme in (MEGATRONS, AUTO)
    stands_in = scheme == MEGATRONS and ranks > 1 and "--sequence-parallel" in recipe.model_args
    return (FLUX if stands_in else scheme), False


def _local_steps(recipe: Recipe) -> int | None:
    """Return the steps between two averages of Local SGD; of a schedule those of its last phase, the most of a run."""
    text = recipe.flag("--local-sgd-steps", "")
    return phases_of(text)[-1].every if text else None


def messages_of(recipe: Recipe) -> QuantisedMessages:
    """Return which messages a recipe quantises."""
    gradients, given = recipe.flag("--zero-quantized-gradients", ""), recipe.model_args
    return QuantisedMessages(
        gradients=QUANTISATIONS.get(gradients).name if gradients else None,
        weights="--zero-quantized-weights" in given,
        ranks_per_node=recipe.number(PER_NODE, 1) if PER_NODE in given else None,
    )


PER_NODE = "--zero-quantized-ranks-per-node"


def _messages_of_run(recipe: Recipe) -> QuantisedMessages:
    """Return the same; its nodes are what torchrun starts, unless the recipe says otherwise."""
    found, started = messages_of(recipe), recipe.launch.get("--nproc-per-node")
    if not found.asked:
        return NOT_QUANTISED
    if found.ranks_per_node or started is None:
        return found
    return found._replace(ranks_per_node=int(started.text))


def _moves(recipe: Recipe) -> Offload | None:
    text = recipe.flag("--pp-offload", "")
    if not text:
        return None
    limit = limit_of(text)
    if limit is None:
        place = recipe.model_args["--pp-offload"].place
        raise Refused(f"{place}: an estimate needs the number of chunks of --pp-offload, got {text}; write a number")
    return Offload(limit, recipe.flag("--pp-offload-to", HOST))


def _chunks(recipe: Recipe, layers: int, pp: int) -> int:
    given = recipe.model_args
    if "--num-virtual-stages-per-pipeline-rank" in given:
        return recipe.number("--num-virtual-stages-per-pipeline-rank", 1)
    if "--num-layers-per-virtual-pipeline-stage" in given:
        ends = sum(f"--account-for-{end}-in-pipeline-split" in given for end in ("embedding", "loss"))
        return max(1, (layers + ends) // pp // recipe.number("--num-layers-per-virtual-pipeline-stage", 1))
    if "--pipeline-model-parallel-layout" in given:
        return max(1, len(_stages_of(recipe)) // pp)
    if "--pp-schedule" in given and pp > 1:
        # as in training: the chunks follow where the schedule knows one number only
        known = SCHEDULES.get(recipe.flag("--pp-schedule", "")).chunks
        return known or (2 if recipe.flag("--pp-placement", "") == "v" else 1)
    return 1


LAYOUT = "--pipeline-model-parallel-layout"


def _stages_of(recipe: Recipe) -> list[str]:
    """Return the stages of --pipeline-model-parallel-layout, E t m L, with its repetitions written out."""
    text = recipe.flag(LAYOUT, "").replace(",", "").replace(" ", "")
    for pattern in (r"\(([^()]+)\)\*(\d+)", r"([EtmL|])\*(\d+)"):
        text = re.sub(pattern, lambda found: found[1] * int(found[2]), text)
    if not re.fullmatch(r"[EtmL|]+", text):
        raise Refused(f"{recipe.model_args[LAYOUT].place}: {LAYOUT} is made of E t m L and |, got {text!r}")
    return text.split("|")


def _layout(recipe: Recipe, layers: int, pp: int) -> tuple[int, ...]:
    """Return the layers of each stage where the recipe says them, by a layout or by its first and last stage's."""
    given = recipe.model_args
    if LAYOUT in given:
        stages = _stages_of(recipe)
        if len(stages) % pp or sum(stage.count("t") for stage in stages) != layers:
            counts = f"{len(stages)} stages and {sum(stage.count('t') for stage in stages)} layers"
            raise Refused(f"{given[LAYOUT].place}: {LAYOUT} has {counts} for {pp} ranks and {layers} layers")
        return tuple(stage.count("t") for stage in stages)
    first, last = (f"--decoder-{end}-pipeline-num-layers" for end in ("first", "last"))
    if pp == 1 or not {first, last} & set(given):
        return ()
    ends = {at: recipe.number(flag, 0) for at, flag in ((0, first), (pp - 1, last)) if flag in given}
    rest, odd = divmod(layers - sum(ends.values()), max(1, pp - len(ends)))
    of_rank, v = [ends.get(at, rest) for at in range(pp)], _chunks(recipe, layers, pp)
    if odd or rest < 0 or any(layers % v for layers in of_rank):
        raise Refused(
            f"{first} and {last} leave {layers - sum(ends.values())} layers for {pp - len(ends)} ranks with {v} chunks "
            f"each; choose numbers that divide"
        )
    return tuple(of_rank[at % pp] // v for at in range(pp * v))


DTYPE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}


def _state_bytes(recipe: Recipe) -> float | None:
    """Return the bytes of optimizer state per parameter that --use-precision-aware-optimizer keeps."""
    if "--use-precision-aware-optimizer" not in recipe.model_args:
        return None
    sizes = {}
    for name in ("main-params", "exp-avg", "exp-avg-sq"):
        dtype = recipe.flag(f"--{name}-dtype", "fp32")
        if dtype not in DTYPE_BYTES:
            place = recipe.model_args[f"--{name}-dtype"].place
            raise Refused(f"{place}: --{name}-dtype is one of {', '.join(DTYPE_BYTES)}, got {dtype!r}")
        sizes[name] = DTYPE_BYTES[dtype]
    # beside a weight in bf16 only the rest of its float32 bits is kept
    if sizes["main-params"] == 4 and "--bf16" in recipe.model_args:
        sizes["main-params"] = 2
    return sum(sizes.values())


def _fp32_grads(recipe: Recipe) -> bool:
    """Return True where bf16 gradients are accumulated in float32: by default Megatron does so, FSDP does not."""
    given = recipe.model_args
    if "--use-megatron-fsdp" in given:
        return recipe.flag("--megatron-fsdp-main-grads-dtype", "auto") == "fp32"
    return not {"--grad-reduce-in-bf16", "--use-torch-fsdp2"} & set(given)


def _recompute_by_default(recipe: Recipe) -> str:
    return "selective" if "--recompute-activations" in recipe.model_args else "none"


def _grid(recipe: Recipe) -> Grid | None:
    sizes = recipe.flag("--hierarchical-context-parallel-sizes", "").split()
    if not sizes:
        return None
    if len(sizes) != 2 or not all(is_whole(size) for size in sizes):
        raise ValueError(f"--hierarchical-context-parallel-sizes takes two ints, got {' '.join(sizes)!r}")
    return Grid(int(sizes[0]), int(sizes[1]))


def _tensor_grid(recipe: Recipe, tp: int) -> tuple[int, int] | None:
    asked = recipe.flag("--tp-grid", "").split()
    if asked in ([], ["auto"]):
        return None
    return grid_of(TENSOR_SCHEMES.get(recipe.flag("--tp-comm-type", MEGATRONS)), tp, asked)


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
