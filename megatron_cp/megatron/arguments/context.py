"""Check the arguments of a run with our attention, where Megatron's own validation does not.

Pure Python: everything here reads attributes, so that a parsed namespace and a TransformerConfig can both be asked.
"""

import math
from argparse import ArgumentParser
from typing import Any

from megatron_cp.context import AUTO as AUTO_BACKEND
from megatron_cp.context import BACKENDS, DEFAULT, PLACEMENTS
from megatron_cp.context.checks import (
    able,
    check_dropout,
    check_grid,
    check_latent,
    check_sinks,
    check_softcap,
    takes_document_layout,
)
from megatron_cp.context.document_layouts import AUTO as AUTO_LAYOUT
from megatron_cp.context.document_layouts import NAMES as DOCUMENT_LAYOUTS
from megatron_cp.context.document_layouts import STREAM
from megatron_cp.context.layouts import ZIGZAG, check_chunks, layout
from megatron_cp.context.masks import mask
from megatron_cp.errors import Refused
from megatron_cp.grid import Grid, most_square
from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.kernels import AUTO, KERNELS, check_caps
from megatron_cp.megatron.arguments.unsupported import (
    INSTEAD_OF_HYBRID,
    Unsupported,
    captures_graphs,
    read,
    refuse,
    shares_weights_out,
)
from megatron_cp.megatron.flags.context import HEAD_FIRST, AttentionFlags, on_stripes, takes_placement
from megatron_cp.megatron.flags.experts import ExpertFlags
from megatron_cp.megatron.flags.pipeline import PipelineFlags
from megatron_cp.megatron.flags.replicas import LocalSgdFlags, MlpFlags, QuantisedFlags, StateFlags
from megatron_cp.megatron.flags.tensor import TensorFlags
from megatron_cp.megatron.run import cuts_at_eod, packs_documents, plans_batches
from megatron_cp.registry import suggest

MEGATRONS_DROPOUT = 0.1  # the rate of attention's dropout where no flag gives one


def _in_chunks(source: Any) -> bool:
    """True if attention keeps chunks in host memory."""
    flags = AttentionFlags.of(source)
    return flags.chunks is not None or any(BACKENDS.get(name).capabilities.over_time for name in comm_types(source))


def _computes_chunks_again(source: Any) -> bool:
    """True if chunks of MLP or loss keep their inputs alone."""
    return read(source, "cp_loss_chunks") is not None or (read(source, "mlp_chunks_for_training") or 1) > 1


def _sends_latents(source: Any) -> bool:
    """True if the latents of multi-latent attention travel between ranks."""
    return bool(read(source, "cp_latent", False))


# Asked of a TransformerConfig by the attention, of the arguments by `check`: the names are the same in both.
UNSUPPORTED = (
    Unsupported(
        "a fixed sink (cp_sink) beside that of a softmax_type other than 'vanilla'",
        lambda source: read(source, "softmax_type", "vanilla") != "vanilla" and read(source, "cp_sink") is not None,
        "leave --cp-sink or --softmax-type out",
    ),
    Unsupported(
        "latents that travel (cp_latent) without multi-latent attention, whose keys and values are expanded from them",
        lambda source: _sends_latents(source) and not read(source, "multi_latent_attention", False),
        "leave --cp-latent out, or add --multi-latent-attention",
    ),
    Unsupported(
        "latents that travel (cp_latent) with an up-projection that is recomputed, in FP8 or FP4, or a cache of "
        "latents: attention expands them itself, once more in the backward pass",
        lambda source: (
            _sends_latents(source)
            and bool(
                "mla_up_proj" in (read(source, "recompute_modules") or ())
                or any(read(source, name) for name in ("fp8", "fp4", "cache_mla_latents"))
            )
        ),
        "leave --cp-latent out, or --recompute-modules mla_up_proj, --fp8-format, --fp4-format and --cache-mla-latents",
    ),
    Unsupported(
        "latents that travel (cp_latent) with chunks (cp_chunks), ALiBi (cp_alibi), dropped weights or a self-check "
        "(cp_self_check)",
        lambda source: (
            _sends_latents(source)
            and bool(
                AttentionFlags.of(source).chunks is not None
                or any(read(source, name) for name in ("cp_alibi", "attention_dropout", "cp_self_check"))
            )
        ),
        "leave --cp-latent out, or --cp-chunks, --cp-alibi and --cp-self-check, and pass --attention-dropout 0",
    ),
    Unsupported(
        "clipping by the largest logit (qk_clip)",
        lambda source: bool(read(source, "qk_clip", False)),
        "leave --qk-clip out",
    ),
    Unsupported(
        "logging the largest logit (log_max_attention_logit)",
        lambda source: bool(read(source, "log_max_attention_logit", False)),
        "leave --log-max-attention-logit out",
    ),
    Unsupported(
        "attention in FP8 (fp8_dot_product_attention, fp8_multi_head_attention): kernels that take FP8 with scales, "
        "scales agreed on by the context-parallel ranks and messages in FP8",
        lambda source: bool(
            read(source, "fp8_dot_product_attention", False) or read(source, "fp8_multi_head_attention", False)
        ),
        "leave both out, FP8 linears around attention in bf16 are served",
    ),
    Unsupported(
        "transformer-engine's offload of activations (cpu_offloading), which fails on views such as our outputs",
        lambda source: bool(read(source, "cpu_offloading", False) or read(source, "cpu_offloading_num_layers", 0)),
        "leave --cpu-offloading-num-layers out, --recompute-granularity saves memory too",
    ),
    Unsupported(
        "kept attention (cp_keep_attention) in FP8 or FP4, whose checkpoints are those of transformer-engine",
        lambda source: bool(read(source, "cp_keep_attention", False) and (read(source, "fp8") or read(source, "fp4"))),
        "leave --cp-keep-attention out, or --fp8-format and --fp4-format",
    ),
    Unsupported(
        "kept attention (cp_keep_attention) under CUDA graphs, which recompute nothing that they capture",
        lambda source: bool(read(source, "cp_keep_attention", False)) and captures_graphs(source),
        "leave --cp-keep-attention out, or --cuda-graph-impl and --enable-cuda-graph",
    ),
    Unsupported(
        "chunks of MLP or loss (mlp_chunks_for_training, cp_loss_chunks) in CUDA graphs, which compute nothing again",
        lambda source: _computes_chunks_again(source) and captures_graphs(source),
        "leave the chunks out, or --cuda-graph-impl and --enable-cuda-graph",
    ),
    Unsupported(
        "logits in chunks (cp_loss_chunks) of an output layer that data-parallel ranks share out or that puts its "
        "weight gradient off, or logits that are read from it (logits_save_dir, logits_load_dir)",
        lambda source: bool(
            read(source, "cp_loss_chunks") is not None
            and (
                shares_weights_out(source)
                or any(
                    read(source, name, False)
                    for name in ("defer_embedding_wgrad_compute", "logits_save_dir", "logits_load_dir")
                )
            )
        ),
        "leave --cp-loss-chunks out, or --use-megatron-fsdp, --use-torch-fsdp2, --defer-embedding-wgrad-compute, "
        "--logits-save-dir and --logits-load-dir",
    ),
    Unsupported(
        "CUDA graphs with chunks in host memory, which is pinned and copied to on streams of its own",
        lambda source: captures_graphs(source) and _in_chunks(source),
        f"leave --cuda-graph-impl and --enable-cuda-graph out, or take {DEFAULT} without --cp-chunks",
    ),
)


def refuse_unsupported(source: Any, where: str) -> None:
    """Raise ValueError, beginning with `where`, for the first thing asked of `source` that attention cannot do."""
    refuse(UNSUPPORTED, source, f"{where}: megatron-cp's attention")


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add our flags to Megatron's parser; usable as an `extra_args_provider`."""
    AttentionFlags.add_to(parser)
    PipelineFlags.add_to(parser)
    TensorFlags.add_to(parser)
    ExpertFlags.add_to(parser)
    LocalSgdFlags.add_to(parser)
    QuantisedFlags.add_to(parser)
    StateFlags.add_to(parser)
    MlpFlags.add_to(parser)
    return parser


def check(args: Any) -> None:
    """Cross-check the arguments of a run that uses our attention.

    Reads only what the command line says, so it may run before or after Megatron's `validate_args`; before it, a
    user reads these messages instead of bare assertions. Raises ValueError with the rule, the value and a way out.
    """
    _check_names(args)
    _check_sizes(args)
    _check_groups(args)
    _check_stripe(args)
    _check_chunks(args)
    _check_loss_chunks(args)
    _check_cluster(args)
    _check_softcap(args)
    _check_window(args)
    _check_sink(args)
    _check_alibi(args)
    _check_latent(args)
    _check_dropout(args)
    _check_kept_attention(args)
    _check_document_layout(args)
    _check_warmup(args)
    refuse_unsupported(args, "arguments")
    _check_call_inputs(args)


def _check_names(args: Any) -> None:
    for name in comm_types(args):
        BACKENDS.get(name)
    flags = AttentionFlags.of(args)
    if flags.kernel != AUTO:
        KERNELS.get(flags.kernel)
    placement = flags.placement
    if placement not in PLACEMENTS:
        raise Refused(
            f"unknown --cp-placement {placement!r}{suggest(placement, PLACEMENTS)}; known: {', '.join(PLACEMENTS)}"
        )
    if placement != HEAD_FIRST and not any(takes_placement(BACKENDS.get(name)) for name in comm_types(args)):
        raise Refused(
            f"--cp-placement {placement} needs --cp-comm-type {able(takes_placement, str)}, got "
            f"{', '.join(comm_types(args))}; leave it out"
        )


def _check_chunks(args: Any) -> None:
    flags, cp, length = AttentionFlags.of(args), read(args, "context_parallel_size", 1), read(args, "seq_length")
    chunks = flags.chunks
    if chunks is None:
        return
    if chunks < 1:
        raise Refused(f"--cp-chunks is the number of pieces, 1 or more, got {chunks}; leave it out for a whole run")
    for entry in map(BACKENDS.get, comm_types(args)):
        if not entry.capabilities.chunks:
            raise Refused(
                f"--cp-chunks {chunks} cannot cut --cp-comm-type {entry.name} into pieces; leave it out or use "
                f"{DEFAULT}"
            )
        if length:
            check_chunks(layout(entry.layout or ZIGZAG, length, cp, flags.stripe), chunks)


def _check_loss_chunks(args: Any) -> None:
    chunks, length = AttentionFlags.of(args).loss_chunks, read(args, "seq_length")
    if chunks is None:
        return
    if chunks < 1:
        raise Refused(f"--cp-loss-chunks is a number of chunks, 1 or more, got {chunks}; leave it out for all logits")
    ranks = read(args, "context_parallel_size", 1)
    ranks *= read(args, "tensor_model_parallel_size", 1) if read(args, "sequence_parallel", False) else 1
    if length and chunks > (tokens := length // ranks):
        raise Refused(f"--cp-loss-chunks {chunks} cuts the {tokens} tokens of a rank; use at most {tokens}")


def _check_cluster(args: Any) -> None:
    cluster = AttentionFlags.of(args).cluster
    if cluster is None:
        return
    chooses = AUTO_BACKEND in comm_types(args) or AttentionFlags.of(args).document_layout == AUTO_LAYOUT
    chooses = chooses or TensorFlags.of(args).chosen
    if not chooses and not plans_batches(args):
        raise Refused(
            f"--cp-cluster {cluster} needs --cp-plan, --cp-comm-type {AUTO_BACKEND}, or {AUTO_BACKEND} for "
            f"--tp-comm-type, --tp-grid or --cp-document-layout, got {', '.join(comm_types(args))}; leave it out"
        )
    load_cluster(cluster)


def _check_softcap(args: Any) -> None:
    flags = AttentionFlags.of(args)
    if flags.softcap is None:
        return
    if not 0 < flags.softcap < math.inf:
        raise Refused(f"--cp-softcap is a positive finite score, got {flags.softcap}; leave it out for none")
    check_caps(flags.kernel)
    for entry in map(BACKENDS.get, comm_types(args)):
        check_softcap(entry)


def _check_window(args: Any) -> None:
    try:
        mask(causal=True, window=getattr(args, "window_size", None))
    except Refused as error:
        raise Refused(f"--window-size: {error}") from None


def _check_sink(args: Any) -> None:
    sink = AttentionFlags.of(args).sink
    if sink is not None and not math.isfinite(sink):
        raise Refused(f"--cp-sink is a finite logit, got {sink}; leave it out for a softmax without a sink")
    if sink is None and read(args, "softmax_type", "vanilla") == "vanilla":
        return
    for entry in map(BACKENDS.get, comm_types(args)):
        check_sinks(entry)


def _check_alibi(args: Any) -> None:
    flags = AttentionFlags.of(args)
    if flags.alibi and flags.softcap is not None:
        raise Refused("--cp-alibi is added to scores that --cp-softcap does not cap; leave one of the two out")


def _check_latent(args: Any) -> None:
    for entry in map(BACKENDS.get, comm_types(args) if _sends_latents(args) else ()):
        check_latent(entry)


def _check_dropout(args: Any) -> None:
    """Refuse dropped weights by a kernel that was not asked for: the default rate of Megatron is not 0."""
    rate, kernel = read(args, "attention_dropout", 0.0), AttentionFlags.of(args).kernel
    if not rate:
        return
    if kernel == AUTO or not KERNELS.get(kernel).drops:
        names = " or ".join(f"{entry.name} ({entry.needs})" for entry in KERNELS if entry.drops)
        whose = " (Megatron's default)" if rate == MEGATRONS_DROPOUT else ""
        raise Refused(
            f"--attention-dropout {rate}{whose} needs a kernel that drops weights, got --cp-kernel {kernel}; pass "
            f"--attention-dropout 0, or --cp-kernel {names}"
        )
    for entry in map(BACKENDS.get, comm_types(args)):
        check_dropout(entry)


def _check_kept_attention(args: Any) -> None:
    """Refuse to keep what is not recomputed, where the flag would have no effect."""
    if not AttentionFlags.of(args).keep_attention:
        return
    # the older flag means the selective one
    asked = read(args, "recompute_granularity") or ("selective" if read(args, "recompute_activations", False) else "")
    modules = read(args, "recompute_modules") or ["core_attn"]
    if not asked:
        raise Refused(
            "--cp-keep-attention keeps what a recomputation would repeat, and this run recomputes nothing; add "
            "--recompute-granularity full, or leave it out"
        )
    if asked == "selective" and "core_attn" not in modules:
        raise Refused(
            "--cp-keep-attention keeps what a recomputation would repeat, got --recompute-modules "
            f"{' '.join(modules)}, which repeat no attention; leave it out, or add core_attn"
        )


def _check_document_layout(args: Any) -> None:
    name = AttentionFlags.of(args).document_layout
    if name not in DOCUMENT_LAYOUTS:
        raise Refused(
            f"unknown --cp-document-layout {name!r}{suggest(name, DOCUMENT_LAYOUTS)}; known: "
            f"{', '.join(DOCUMENT_LAYOUTS)}"
        )
    if name == STREAM:
        return
    if not (packs_documents(args) or plans_batches(args)):
        raise Refused(
            f"--cp-document-layout {name} lays out packed documents, got none; pass "
            "--dataloader-inter-document-masking, --reset-attention-mask, --sft or --cp-plan"
        )
    for entry in map(BACKENDS.get, comm_types(args)):
        if not takes_document_layout(entry):
            raise Refused(
                f"--cp-document-layout {name} needs an algorithm without a layout of its own, got --cp-comm-type "
                f"{entry.name}; use {able(takes_document_layout, str)}"
            )
    if AttentionFlags.of(args).chunks is not None:
        raise Refused(f"--cp-document-layout {name} cannot be cut into --cp-chunks; leave one of the two out")


def _check_stripe(args: Any) -> None:
    flags, cp, length = AttentionFlags.of(args), read(args, "context_parallel_size", 1), read(args, "seq_length")
    stripe = flags.stripe
    if stripe < 1:
        raise Refused(f"--cp-stripe is the number of tokens in a block, 1 or more, got {stripe}")
    if stripe > 1 and not any(on_stripes(BACKENDS.get(name)) for name in comm_types(args)):
        raise Refused(
            f"--cp-stripe {stripe} needs --cp-comm-type {able(on_stripes, str)}, got {', '.join(comm_types(args))}; "
            f"leave it out"
        )
    if stripe > 1 and cp > 1 and length and length % (stripe * cp):
        raise Refused(
            f"--seq-length must be divisible by --cp-stripe * --context-parallel-size = {stripe * cp}, got {length}; "
            f"use another stripe or --seq-length {-(-length // (stripe * cp)) * stripe * cp}"
        )


def comm_types(args: Any) -> list[str]:
    """Return the values of --cp-comm-type, one entry for all layers or one for each layer."""
    value = read(args, "cp_comm_type") or ["p2p"]
    return [value] if isinstance(value, str) else list(value)


def _check_sizes(args: Any) -> None:
    cp, tp = read(args, "context_parallel_size", 1), read(args, "tensor_model_parallel_size", 1)
    pp, world = read(args, "pipeline_model_parallel_size", 1), read(args, "world_size")
    if world and tp * cp * pp > world:
        raise Refused(
            f"--context-parallel-size {cp} with --tensor-model-parallel-size {tp} and --pipeline-model-parallel-size "
            f"{pp} needs {tp * cp * pp} processes, got {world}; start more processes or lower a size"
        )
    heads = read(args, "num_attention_heads")
    if heads and heads % tp:
        raise Refused(
            f"--num-attention-heads must be divisible by --tensor-model-parallel-size, got {heads} and {tp}; "
            f"change one of the two"
        )
    length = read(args, "seq_length")
    if length and cp > 1 and length % (2 * cp):
        near = -(-length // (2 * cp)) * 2 * cp
        raise Refused(
            f"--seq-length must be divisible by 2 * --context-parallel-size = {2 * cp}, got {length}; use {near}"
        )
    types, layers = comm_types(args), read(args, "num_layers")
    if layers and len(types) not in (1, layers):
        raise Refused(
            f"--cp-comm-type takes one name or one for each of the {layers} layers, got {len(types)}; "
            f"repeat names until there are {layers}"
        )


def _check_groups(args: Any) -> None:
    cp = read(args, "context_parallel_size", 1)
    sizes = read(args, "hierarchical_context_parallel_sizes")
    if sizes and (math.prod(sizes) != cp or min(sizes) < 1):
        raise Refused(
            f"--hierarchical-context-parallel-sizes must be positive and multiply to --context-parallel-size, got "
            f"{' * '.join(map(str, sizes))} = {math.prod(sizes)} and {cp}; change one of the two"
        )
    on_grid = [name for name in comm_types(args) if BACKENDS.get(name).needs_grid]
    if on_grid and cp > 1 and (not sizes or len(sizes) != 2):
        square = most_square(cp)
        raise Refused(
            f"--cp-comm-type {on_grid[0]} needs two --hierarchical-context-parallel-sizes whose product is "
            f"{cp} (the context-parallel size), got {sizes or 'none'}; add for example "
            f"--hierarchical-context-parallel-sizes {square.inner} {square.outer}"
        )
    for name in comm_types(args) if sizes and len(sizes) == 2 else ():
        check_grid(BACKENDS.get(name), Grid(*sizes))
    _check_heads(args, cp, sizes)


def _check_heads(args: Any, cp: int, sizes: list[int] | None) -> None:
    """Check that each rank of a head exchange gets a query head of those that tensor parallelism leaves."""
    heads = (read(args, "num_attention_heads") or 0) // read(args, "tensor_model_parallel_size", 1)
    grid = Grid(*sizes) if sizes and len(sizes) == 2 else None
    for name in sorted({BACKENDS.get(name).name for name in comm_types(args)}):
        ranks = BACKENDS.get(name).head_ranks(cp, grid, PLACEMENTS[AttentionFlags.of(args).placement])
        if 0 < heads < ranks:
            raise Refused(
                f"--cp-comm-type {name} splits the query heads of a tensor-parallel rank over {ranks} ranks, "
                f"got {heads} heads; use at most {heads} ranks for heads, or {DEFAULT}"
            )


def _check_packed(args: Any) -> None:
    """Refuse what needs the samples of a microbatch apart, and two ways to cut one sample into documents."""
    samples, balancing = read(args, "micro_batch_size", 1) or 1, read(args, "moe_router_load_balancing_type", ())
    kinds = [balancing] if isinstance(balancing, str) else list(balancing or ())
    if samples > 1 and read(args, "num_experts") and "seq_aux_loss" in kinds:
        raise Refused(
            f"--moe-router-load-balancing-type seq_aux_loss balances each sample, and packed documents make one "
            f"sequence of a microbatch, got --micro-batch-size {samples}; pass 1, or aux_loss"
        )
    if cuts_at_eod(args) and read(args, "dataloader_inter_document_masking", False):
        raise Refused(
            "--reset-attention-mask ends documents at EOD tokens and --dataloader-inter-document-masking where those "
            "of the corpus end; leave one of the two out"
        )
    if read(args, "overlap_moe_expert_parallel_comm", False):
        raise Refused(
            "--overlap-moe-expert-parallel-comm runs layers by themselves, and the model's own forward hands them the "
            "ends of packed documents; leave one of the two out"
        )


def _check_warmup(args: Any) -> None:
    """Check what Megatron asserts without a message, and only after the model is built."""
    for unit in ("iters", "samples"):
        warmup, steps = read(args, f"lr_warmup_{unit}", 0), read(args, f"train_{unit}")
        decay = read(args, f"lr_decay_{unit}") or steps
        if steps and warmup >= decay:
            raise Refused(
                f"--lr-warmup-{unit} must be less than --lr-decay-{unit}, by default --train-{unit}, got {warmup} and "
                f"{decay}; lower it or train longer"
            )


def _check_call_inputs(args: Any) -> None:
    if read(args, "hybrid_context_parallel", False):
        raise Refused(
            f"megatron-cp's attention does not take the groups of --hybrid-context-parallel, which Megatron forms of "
            f"1, 2, 4, … ranks without a pipeline; {INSTEAD_OF_HYBRID}"
        )
    if read(args, "rl_use_sequence_packing", False):
        raise Refused(
            "megatron-cp's attention does not do packed documents, which --rl-use-sequence-packing asks for; "
            "leave it out"
        )
    if packs_documents(args):
        _check_packed(args)
    if read(args, "create_attention_mask_in_dataloader", False):
        raise Refused(
            "megatron-cp's attention needs no mask tensor, and a full one takes memory with the square of the "
            "sequence length; pass --no-create-attention-mask-in-dataloader"
        )
