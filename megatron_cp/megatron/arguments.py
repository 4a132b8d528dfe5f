"""Flags of ours, and the checks that Megatron's own argument validation leaves out.

Pure Python: everything here reads attributes, so that a parsed namespace and a TransformerConfig can both be asked.
"""

from argparse import ArgumentParser
from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

from megatron_cp.context import AUTO as AUTO_BACKEND
from megatron_cp.context import BACKENDS, PLACEMENTS
from megatron_cp.kernels import AUTO, KERNELS
from megatron_cp.pipeline import SCHEDULES
from megatron_cp.pipeline.action import WEIGHT
from megatron_cp.pipeline.build import build
from megatron_cp.pipeline.passes import merge
from megatron_cp.pipeline.schedule import BadSchedule
from megatron_cp.planner.hardware import load_cluster, shipped_clusters
from megatron_cp.registry import suggest

HEAD_FIRST = "head-first"


class Unsupported(NamedTuple):
    """Something that a user can ask of attention and that this attention does not do."""

    what: str
    asked: Callable[[Any], bool]
    way_out: str


def _read(source: Any, name: str, default: Any = None) -> Any:
    return getattr(source, name, default)


def _mla_heads_differ(source: Any) -> bool:
    if not _read(source, "multi_latent_attention", False):
        return False
    query_key = _read(source, "qk_head_dim", 0) + _read(source, "qk_pos_emb_head_dim", 0)
    return bool(query_key != _read(source, "v_head_dim", 0))


# Asked of a TransformerConfig by the attention, of the arguments by `check`: the names are the same in both.
UNSUPPORTED = (
    Unsupported(
        "a softmax with a sink (softmax_type other than 'vanilla')",
        lambda source: _read(source, "softmax_type", "vanilla") != "vanilla",
        "leave --softmax-type out",
    ),
    Unsupported(
        "clipping by the largest logit (qk_clip)",
        lambda source: bool(_read(source, "qk_clip", False)),
        "leave --qk-clip out",
    ),
    Unsupported(
        "logging the largest logit (log_max_attention_logit)",
        lambda source: bool(_read(source, "log_max_attention_logit", False)),
        "leave --log-max-attention-logit out",
    ),
    Unsupported(
        "multi-latent attention whose v_head_dim is not qk_head_dim + qk_pos_emb_head_dim",
        _mla_heads_differ,
        "leave --multi-latent-attention out or use stock attention",
    ),
)


def refuse_unsupported(source: Any, where: str) -> None:
    """Raise ValueError, beginning with `where`, for the first thing asked of `source` that attention cannot do."""
    for feature in UNSUPPORTED:
        if feature.asked(source):
            raise ValueError(f"{where}: megatron-cp's attention does not do {feature.what}; {feature.way_out}")


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the flags of ours to Megatron's parser; usable as an `extra_args_provider`."""
    group = parser.add_argument_group(title="context-parallel attention (megatron-cp)")
    group.add_argument(
        "--cp-kernel",
        default=AUTO,
        metavar="{" + ",".join([AUTO, *KERNELS.names]) + "}",
        help="Attention kernel on one device; auto takes the fastest one that the machine has and says why. "
        "The algorithm between the ranks is chosen with --cp-comm-type: "
        + ", ".join("=".join([entry.name, *entry.aliases]) for entry in BACKENDS)
        + ".",
    )
    group.add_argument(
        "--cp-placement",
        default=HEAD_FIRST,
        metavar="{" + ",".join(PLACEMENTS) + "}",
        help="With --cp-comm-type usp, which of the two --hierarchical-context-parallel-sizes exchanges heads: "
        "head-first the first (neighbouring ranks), context-first the second.",
    )
    group.add_argument(
        "--cp-stripe",
        type=int,
        default=1,
        metavar="TOKENS",
        help="With --cp-comm-type striped, tokens in a block that one rank owns; longer blocks make larger tiles and "
        "a coarser balance.",
    )
    group.add_argument(
        "--cp-cluster",
        default=None,
        metavar="NAME|FILE",
        help="With --cp-comm-type auto, the cluster that a backend is chosen for: "
        + ", ".join(shipped_clusters())
        + ", or a YAML file; by default the one that ships for this machine's GPU.",
    )
    _add_schedule_arguments(parser)
    return parser


def _add_schedule_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group(title="pipeline schedules (megatron-cp)")
    group.add_argument(
        "--pp-schedule",
        default=None,
        metavar="{" + ",".join(SCHEDULES.names) + "}",
        help="Order of forwards and backwards over the pipeline, instead of Megatron's own: "
        + "; ".join(f"{rule.name}: {rule.what}" for rule in SCHEDULES)
        + ". Chunks per rank come from --num-virtual-stages-per-pipeline-rank and its kin.",
    )


SCHEDULE_UNSUPPORTED = (
    Unsupported(
        "CUDA graphs, which are captured in Megatron's own order",
        lambda args: _read(args, "cuda_graph_impl", "none") != "none",
        "leave --cuda-graph-impl out",
    ),
    Unsupported(
        "overlap of expert-parallel communication, which brings an order of its own",
        lambda args: any(
            _read(args, name, False)
            for name in ("overlap_moe_expert_parallel_comm", "overlap_dispatch_backward_with_experts_wgrad")
        ),
        "leave --overlap-moe-expert-parallel-comm out",
    ),
    Unsupported(
        "Megatron's own delay of weight gradients",
        lambda args: any(_read(args, name, False) for name in ("delay_wgrad_compute", "defer_embedding_wgrad_compute")),
        "leave --delay-wgrad-compute and --defer-embedding-wgrad-compute out, a split schedule delays them itself",
    ),
    Unsupported(
        "offloading of activations in Megatron's own order",
        lambda args: bool(_read(args, "fine_grained_activation_offloading", False)),
        "leave --fine-grained-activation-offloading out",
    ),
    Unsupported(
        "a stash of routed tokens that is replayed",
        lambda args: (
            bool(_read(args, "moe_paged_stash", False)) or _read(args, "moe_expert_rank_capacity_factor") is not None
        ),
        "leave --moe-paged-stash and --moe-expert-rank-capacity-factor out",
    ),
    Unsupported(
        "Megatron's or torch's fully sharded data parallelism",
        lambda args: any(_read(args, name, False) for name in ("use_megatron_fsdp", "use_torch_fsdp2")),
        "use --use-distributed-optimizer",
    ),
)


def check_schedule(args: Any) -> None:
    """Refuse what `--pp-schedule` names and this run cannot have; ValueError with the rule, the value and a way out."""
    name = _read(args, "pp_schedule")
    if name is None:
        return
    rule = SCHEDULES.get(name)
    size = _read(args, "pipeline_model_parallel_size", 1)
    if size < 2:
        raise ValueError(
            f"--pp-schedule {name} needs --pipeline-model-parallel-size of at least 2, got {size}; "
            f"leave --pp-schedule out or use more ranks"
        )
    if rule.placement != "loop" or rule.table is None:
        runs = [other.name for other in SCHEDULES if other.placement == "loop" and other.table]
        raise ValueError(
            f"--pp-schedule {name} cannot be trained with yet, only simulated; take one of {', '.join(runs)}"
        )
    for feature in SCHEDULE_UNSUPPORTED:
        if feature.asked(args):
            raise ValueError(f"--pp-schedule {name} does not do {feature.what}; {feature.way_out}")


def check_table(args: Any) -> None:
    """Refuse sizes that `--pp-schedule` has no table for, once Megatron has worked them out; ValueError in one line."""
    name = _read(args, "pp_schedule")
    if name is None:
        return
    chunks = _read(args, "virtual_pipeline_model_parallel_size") or 1
    if SCHEDULES.get(name).chunks is None and chunks == 1:
        raise ValueError(
            f"--pp-schedule {name} needs more than one chunk per rank, got 1; "
            f"add --num-virtual-stages-per-pipeline-rank 2 or take zb-h1"
        )
    micros = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    try:
        schedule = build(name, args.pipeline_model_parallel_size, micros, chunks)
    except BadSchedule as bad:
        raise ValueError(f"--pp-schedule {name} {bad.reason}") from bad
    split = any(action.kind == WEIGHT for actions in merge(schedule).table for action in actions)
    if split and _read(args, "transformer_impl") == "transformer_engine":
        raise ValueError(
            f"--pp-schedule {name} needs linears whose backward can be split, and those of transformer-engine "
            f"cannot yet; pass --transformer-impl local, or take {', '.join(_unsplit(chunks))}"
        )


def _unsplit(chunks: int) -> list[str]:
    fits = [rule for rule in SCHEDULES if rule.placement == "loop" and rule.table and rule.chunks in (None, chunks)]
    return [rule.name for rule in fits if not rule.split and (chunks == 1) == (rule.chunks == 1)]


def check(args: Any) -> None:
    """Cross-check the arguments of a run that uses our attention.

    Reads only what the command line says, so it may run before or after Megatron's `validate_args`; before it, a
    user reads these sentences instead of bare assertions. Raises ValueError with the rule, the value and a way out.
    """
    _check_names(args)
    _check_sizes(args)
    _check_groups(args)
    _check_stripe(args)
    _check_cluster(args)
    refuse_unsupported(args, "arguments")
    _check_call_inputs(args)


def _check_names(args: Any) -> None:
    for name in comm_types(args):
        BACKENDS.get(name)
    kernel = _read(args, "cp_kernel", AUTO)
    if kernel != AUTO:
        KERNELS.get(kernel)
    placement = _read(args, "cp_placement", HEAD_FIRST)
    if placement not in PLACEMENTS:
        raise ValueError(
            f"unknown --cp-placement {placement!r}{suggest(placement, PLACEMENTS)}; known: {', '.join(PLACEMENTS)}"
        )


def is_striped(comm_type: str) -> bool:
    """Whether this algorithm works on stripes."""
    return BACKENDS.get(comm_type).layout == "striped"


def _check_cluster(args: Any) -> None:
    cluster = _read(args, "cp_cluster")
    if cluster is None:
        return
    if AUTO_BACKEND not in comm_types(args):
        raise ValueError(
            f"--cp-cluster {cluster} needs --cp-comm-type {AUTO_BACKEND}, got {', '.join(comm_types(args))}; "
            f"leave it out"
        )
    load_cluster(cluster)


def _check_stripe(args: Any) -> None:
    stripe, cp, length = _read(args, "cp_stripe", 1), _read(args, "context_parallel_size", 1), _read(args, "seq_length")
    if stripe < 1:
        raise ValueError(f"--cp-stripe is the number of tokens in a block, 1 or more, got {stripe}")
    if stripe > 1 and not any(is_striped(name) for name in comm_types(args)):
        raise ValueError(
            f"--cp-stripe {stripe} needs --cp-comm-type striped, got {', '.join(comm_types(args))}; leave it out"
        )
    if stripe > 1 and cp > 1 and length and length % (stripe * cp):
        raise ValueError(
            f"--seq-length must be divisible by --cp-stripe * --context-parallel-size = {stripe * cp}, got {length}; "
            f"use another stripe or --seq-length {-(-length // (stripe * cp)) * stripe * cp}"
        )


def comm_types(args: Any) -> list[str]:
    """What --cp-comm-type says, one entry for all layers or one for each layer."""
    value = _read(args, "cp_comm_type") or ["p2p"]
    return [value] if isinstance(value, str) else list(value)


def _check_sizes(args: Any) -> None:
    cp, tp = _read(args, "context_parallel_size", 1), _read(args, "tensor_model_parallel_size", 1)
    pp, world = _read(args, "pipeline_model_parallel_size", 1), _read(args, "world_size")
    if world and tp * cp * pp > world:
        raise ValueError(
            f"--context-parallel-size {cp} with --tensor-model-parallel-size {tp} and --pipeline-model-parallel-size "
            f"{pp} needs {tp * cp * pp} processes, got {world}; start more processes or lower a size"
        )
    heads = _read(args, "num_attention_heads")
    if heads and heads % tp:
        raise ValueError(
            f"--num-attention-heads must be divisible by --tensor-model-parallel-size, got {heads} and {tp}; "
            f"change one of the two"
        )
    length = _read(args, "seq_length")
    if length and cp > 1 and length % (2 * cp):
        near = -(-length // (2 * cp)) * 2 * cp
        raise ValueError(
            f"--seq-length must be divisible by 2 * --context-parallel-size = {2 * cp}, got {length}; use {near}"
        )
    types, layers = comm_types(args), _read(args, "num_layers")
    if layers and len(types) not in (1, layers):
        raise ValueError(
            f"--cp-comm-type takes one name or one for each of the {layers} layers, got {len(types)}; "
            f"repeat names until there are {layers}"
        )


def _check_groups(args: Any) -> None:
    cp = _read(args, "context_parallel_size", 1)
    sizes = _read(args, "hierarchical_context_parallel_sizes")
    if sizes and prod(sizes) != cp:
        raise ValueError(
            f"--hierarchical-context-parallel-sizes must multiply to --context-parallel-size, got "
            f"{' * '.join(map(str, sizes))} = {prod(sizes)} and {cp}; change one of the two"
        )
    on_grid = [name for name in comm_types(args) if BACKENDS.get(name).needs_grid]
    if on_grid and cp > 1 and (not sizes or len(sizes) != 2):
        raise ValueError(
            f"--cp-comm-type {on_grid[0]} needs two --hierarchical-context-parallel-sizes whose product is "
            f"{cp} (the context-parallel size), got {sizes or 'none'}; add for example "
            f"--hierarchical-context-parallel-sizes {_split(cp)}"
        )
    _check_heads(args, cp, sizes)


def _check_heads(args: Any, cp: int, sizes: list[int] | None) -> None:
    """Ranks that exchange heads need one query head each; heads are shared with tensor parallelism."""
    heads = (_read(args, "num_attention_heads") or 0) // _read(args, "tensor_model_parallel_size", 1)
    names = {BACKENDS.get(name).name for name in comm_types(args)}
    inner, outer = sizes if sizes and len(sizes) == 2 else (1, 1)
    usp = inner if _read(args, "cp_placement", HEAD_FIRST) == HEAD_FIRST else outer
    degrees = {"ulysses": cp, "fpdt": cp, "usp": usp}
    for name in sorted(names & set(degrees)):
        if 0 < heads < degrees[name]:
            raise ValueError(
                f"--cp-comm-type {name} deals the query heads of a tensor-parallel rank to {degrees[name]} ranks, "
                f"got {heads} heads; use at most {heads} ranks for heads, or zigzag"
            )


def _split(size: int) -> str:
    inner = next(width for width in range(int(size**0.5), 0, -1) if size % width == 0)
    return f"{size // inner} {inner}"


def _check_call_inputs(args: Any) -> None:
    dropout = _read(args, "attention_dropout", 0.0)
    if dropout:
        raise ValueError(
            f"megatron-cp's attention does not do dropout, got --attention-dropout {dropout}; "
            f"pass --attention-dropout 0"
        )
    for name in ("reset_attention_mask", "sft", "hybrid_context_parallel", "rl_use_sequence_packing"):
        if _read(args, name, False):
            raise ValueError(
                f"megatron-cp's attention does not do packed documents, which --{name.replace('_', '-')} asks for; "
                f"leave it out"
            )
    if _read(args, "create_attention_mask_in_dataloader", False):
        raise ValueError(
            "megatron-cp's attention needs no mask tensor, and a full one takes memory with the square of the "
            "sequence length; pass --no-create-attention-mask-in-dataloader"
        )
