"""Flags of ours, and the checks that Megatron's own argument validation leaves out.

Pure Python: everything here reads attributes, so that a parsed namespace and a TransformerConfig can both be asked.
"""

from argparse import ArgumentParser
from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

from megatron_cp.context import AUTO as AUTO_BACKEND
from megatron_cp.context import BACKENDS, PLACEMENTS
from megatron_cp.context.layouts import check_chunks, layout
from megatron_cp.grid import Grid
from megatron_cp.kernels import AUTO, KERNELS
from megatron_cp.megatron.costs import caps, equal, given, refuse_cap
from megatron_cp.pipeline import SCHEDULES, on_v
from megatron_cp.pipeline.build import build, place
from megatron_cp.pipeline.placement import PLACEMENTS as WHERE
from megatron_cp.pipeline.schedule import BadSchedule
from megatron_cp.planner.hardware import load_cluster, shipped_clusters
from megatron_cp.registry import suggest

HEAD_FIRST = "head-first"
AUTO_SCHEDULE = "auto"


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
        "--cp-chunks",
        type=int,
        default=None,
        metavar="PIECES",
        help="Cut attention into so many pieces over time, with what waits in host memory (FPDT). Takes every "
        f"--cp-comm-type but {', '.join(entry.name for entry in BACKENDS if not entry.chunks)}.",
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
    group.add_argument(
        "--pp-placement",
        default=None,
        metavar="{" + ",".join(WHERE) + "}",
        help="With --pp-schedule auto, whether stages go around the ranks, which is the default, or down and up again.",
    )
    group.add_argument(
        "--pp-costs",
        default=None,
        metavar="FILE",
        help="With --pp-schedule auto, the times and activations of every stage that it schedules for: YAML or JSON, "
        "as --pp-profile-steps writes it.",
    )
    group.add_argument(
        "--pp-profile-steps",
        type=int,
        default=None,
        metavar="STEPS",
        help="With --pp-schedule auto and without --pp-costs, measure them in the first steps, at least 2, schedule "
        "for them from then on, and leave them beside the checkpoints of --save.",
    )
    group.add_argument(
        "--pp-memory-limit",
        type=float,
        default=None,
        metavar="M_B",
        help="Most activations of a rank, in what its layers keep of one microbatch (M_B): auto stays below it, a "
        "fixed schedule that needs more is refused.",
    )


def _splits_te(args: Any) -> bool:
    te = _read(args, "transformer_impl", "transformer_engine") == "transformer_engine"
    return te and SCHEDULES.get(args.pp_schedule).split


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
        "transformer-engine's overlap of tensor-parallel communication, which cannot delay weight gradients",
        lambda args: _splits_te(args) and bool(_read(args, "tp_comm_overlap", False)),
        "leave --tp-comm-overlap out, or take a schedule without W",
    ),
    Unsupported(
        "transformer-engine's fused operations, which delay no weight gradients",
        lambda args: _splits_te(args) and bool(_read(args, "use_transformer_engine_op_fuser", False)),
        "leave --use-transformer-engine-op-fuser out, or take a schedule without W",
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


V_UNSUPPORTED = (
    Unsupported(
        "multi-token prediction, whose losses Megatron collects on the last rank",
        lambda args: bool(_read(args, "mtp_num_layers")),
        "leave --mtp-num-layers out, or take a schedule on the loop",
    ),
    Unsupported(
        "a number of layers for the first or the last rank, whose stages lie elsewhere on the V",
        lambda args: any(
            _read(args, f"{which}_pipeline_num_layers") is not None for which in ("decoder_first", "decoder_last")
        ),
        "say the layers of every stage with --pipeline-model-parallel-layout",
    ),
    Unsupported(
        "checkpoints that keep a rank's chunks together, for they hold other layers than on the loop",
        lambda args: (
            any(_read(args, name) for name in ("save", "load"))
            and _read(args, "ckpt_format", "torch_dist") != "torch_dist"
        ),
        "leave --ckpt-format out, torch_dist can be loaded under any schedule",
    ),
)


SAYS_CHUNKS = (
    "num_virtual_stages_per_pipeline_rank",
    "num_layers_per_virtual_pipeline_stage",
    "pipeline_model_parallel_layout",
    "hybrid_layer_pattern",
)


def imply_chunks(args: Any) -> int:
    """Fill in the chunks per rank where the schedule knows one number only; that number, or 0 where nothing changed."""
    name = _read(args, "pp_schedule")
    chunks = (SCHEDULES.get(name).chunks or (2 if _read(args, "pp_placement") == "v" else 1)) if name else 1
    if chunks == 1 or any(_read(args, option) is not None for option in SAYS_CHUNKS):
        return 0
    args.num_virtual_stages_per_pipeline_rank = chunks
    return chunks


def check_schedule(args: Any) -> None:
    """Refuse what `--pp-schedule` names and this run cannot have; ValueError with the rule, the value and a way out."""
    check_costs(args)
    name = _read(args, "pp_schedule")
    if name is None:
        return
    size = _read(args, "pipeline_model_parallel_size", 1)
    if size < 2:
        raise ValueError(
            f"--pp-schedule {name} needs --pipeline-model-parallel-size of at least 2, got {size}; "
            f"leave --pp-schedule out or use more ranks"
        )
    for feature in (*SCHEDULE_UNSUPPORTED, *(V_UNSUPPORTED if on_v(name, _read(args, "pp_placement")) else ())):
        if feature.asked(args):
            raise ValueError(f"--pp-schedule {name} does not do {feature.what}; {feature.way_out}")


def check_costs(args: Any) -> None:
    """Refuse what the flags beside `--pp-schedule` cannot mean together; ValueError in one line."""
    name, file, steps = (_read(args, flag) for flag in ("pp_schedule", "pp_costs", "pp_profile_steps"))
    limit = _read(args, "pp_memory_limit")
    placement = _read(args, "pp_placement")
    for flag, value in (("--pp-placement", placement), ("--pp-costs", file), ("--pp-profile-steps", steps)):
        if value is not None and name != AUTO_SCHEDULE:
            raise ValueError(
                f"{flag} {value} needs --pp-schedule {AUTO_SCHEDULE}, got {name or 'none'}; leave one of the two out"
            )
    if placement not in (None, *WHERE):
        raise ValueError(f"unknown --pp-placement {placement!r}{suggest(placement, WHERE)}; known: {', '.join(WHERE)}")
    if steps is not None and steps < 2:
        raise ValueError(f"--pp-profile-steps must be 2 or more, the first step only warms up, got {steps}")
    if limit is not None and name is None:
        raise ValueError(f"--pp-memory-limit {limit:g} needs --pp-schedule; leave it out")
    if limit is not None and not limit > 0:
        raise ValueError(f"--pp-memory-limit is a positive number of M_B, got {limit:g}")
    if name == AUTO_SCHEDULE and (file is None) == (steps is None):
        raise ValueError(
            f"--pp-schedule {AUTO_SCHEDULE} schedules from times: give one of --pp-costs FILE and "
            f"--pp-profile-steps 10, got {'none' if file is None else 'both'}"
        )


def check_table(args: Any) -> None:
    """Refuse sizes that `--pp-schedule` has no table for, once Megatron has worked them out; ValueError in one line."""
    name = _read(args, "pp_schedule")
    if name is None:
        return
    rule, chunks = SCHEDULES.get(name), _read(args, "virtual_pipeline_model_parallel_size") or 1
    if rule.table and rule.chunks is None and chunks == 1:
        raise ValueError(
            f"--pp-schedule {name} needs more than one chunk per rank, got 1; "
            f"add --num-virtual-stages-per-pipeline-rank 2 or take zb-h1"
        )
    placement = place(rule, args.pipeline_model_parallel_size, chunks, _read(args, "pp_placement"))
    known = given(args, placement) or equal(placement)
    refuse_cap(args, placement, known.costs)
    if rule.table is None:
        return
    micros = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    try:
        build(name, placement.ranks, micros, chunks, costs=known.costs, caps=caps(args, placement))
    except BadSchedule as bad:
        raise ValueError(f"--pp-schedule {name} {bad.reason}") from bad
    except ValueError as error:
        raise ValueError(f"--pp-schedule {name}: {error}") from None


def check(args: Any) -> None:
    """Cross-check the arguments of a run that uses our attention.

    Reads only what the command line says, so it may run before or after Megatron's `validate_args`; before it, a
    user reads these sentences instead of bare assertions. Raises ValueError with the rule, the value and a way out.
    """
    _check_names(args)
    _check_sizes(args)
    _check_groups(args)
    _check_stripe(args)
    _check_chunks(args)
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
    if placement != HEAD_FIRST and not any(takes_placement(name) for name in comm_types(args)):
        raise ValueError(
            f"--cp-placement {placement} needs --cp-comm-type usp, got {', '.join(comm_types(args))}; leave it out"
        )


def is_striped(comm_type: str) -> bool:
    """Whether this algorithm works on stripes."""
    return BACKENDS.get(comm_type).layout == "striped"


def takes_placement(comm_type: str) -> bool:
    """Whether this algorithm asks which axis exchanges heads."""
    return BACKENDS.get(comm_type).placed


def _check_chunks(args: Any) -> None:
    chunks, cp, length = _read(args, "cp_chunks"), _read(args, "context_parallel_size", 1), _read(args, "seq_length")
    if chunks is None:
        return
    if chunks < 1:
        raise ValueError(f"--cp-chunks is the number of pieces, 1 or more, got {chunks}; leave it out for a whole run")
    for entry in map(BACKENDS.get, comm_types(args)):
        if not entry.chunks:
            raise ValueError(
                f"--cp-chunks {chunks} cannot cut --cp-comm-type {entry.name} into pieces; leave it out or use fpdt"
            )
        if length:
            check_chunks(layout(entry.layout or "zigzag", length, cp, _read(args, "cp_stripe", 1)), chunks)


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
    for name in comm_types(args) if sizes and len(sizes) == 2 else ():
        BACKENDS.get(name).check_grid(Grid(*sizes))
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
