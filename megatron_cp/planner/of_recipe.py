"""Read from a recipe how its training is spread over ranks."""

import re
from typing import Any

from megatron_cp.context import BACKENDS
from megatron_cp.errors import Refused
from megatron_cp.experts import AUTO as AUTO_GATHER
from megatron_cp.experts import EXCHANGES, NONE, TOKENS, TUTEL, WEIGHTS
from megatron_cp.experts import PLACEMENTS as EXPERT_PLACEMENTS
from megatron_cp.experts.copies import NO_COPIES, ExpertCopies
from megatron_cp.experts.degree import check_pieces
from megatron_cp.experts.dispatch_cost import ALLGATHER, ALLTOALL, STOCK, Dispatch
from megatron_cp.grid import Grid
from megatron_cp.hardware.cluster import Cluster
from megatron_cp.hardware.cluster_file import load_cluster, shipped_clusters
from megatron_cp.pipeline import SCHEDULES
from megatron_cp.pipeline.offload import Offload, limit_of
from megatron_cp.pipeline.schedule import HOST
from megatron_cp.planner.parallel import NOT_QUANTISED, SHARDINGS, Parallel, QuantisedMessages
from megatron_cp.recipe.command import processes
from megatron_cp.recipe.recipe import Recipe
from megatron_cp.registry import suggest
from megatron_cp.replicas import AVERAGE, OUTERS, QUANTISATIONS
from megatron_cp.replicas.sync_steps import phases_of
from megatron_cp.tensor import AUTO, FLUX, MEGATRONS
from megatron_cp.tensor import SCHEMES as TENSOR_SCHEMES
from megatron_cp.tensor.place import AUTO_ENGINE, engine_of, grid_of
from megatron_cp.units import is_whole

GATHERS = (TOKENS, WEIGHTS, AUTO_GATHER)
"""Names of --moe-gather: what ranks that share each expert may gather."""


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
    exchange = EXCHANGES.get(recipe.flag("--moe-comm-type", STOCK.comm_type))
    pieces = check_pieces(recipe.number("--moe-pieces", 1))
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
    """Return what ranks that share each expert gather; where a run chooses, it is transformer-engine that does not.

    Raises ValueError for a name unknown.
    """
    asked = recipe.flag("--moe-gather", "") or None
    if asked not in (None, *GATHERS):
        place = recipe.model_args["--moe-gather"].place
        raise Refused(f"{place}: --moe-gather is one of {', '.join(GATHERS)}, got {asked!r}{suggest(asked, GATHERS)}")
    if recipe.number("--expert-tensor-parallel-size", recipe.number("--tensor-model-parallel-size", 1)) == 1:
        return TOKENS
    local = recipe.flag("--transformer-impl", "transformer_engine") == "local"
    return asked or (AUTO_GATHER if chosen and local else TOKENS)


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
