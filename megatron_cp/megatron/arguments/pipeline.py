"""Checks of the flags for pipeline schedules, before the model is built."""

from typing import Any

from megatron_cp.context import BACKENDS
from megatron_cp.context.document_layouts import STREAM
from megatron_cp.errors import Refused, as_refusals
from megatron_cp.megatron.arguments.combined import check_combined
from megatron_cp.megatron.arguments.free_running import check_free_running
from megatron_cp.megatron.arguments.unsupported import (
    PARTS_OF_SEQUENCES,
    Unsupported,
    captures_graphs,
    read,
    refuse,
    shares_weights_out,
)
from megatron_cp.megatron.flags.context import AttentionFlags
from megatron_cp.megatron.flags.pipeline import PipelineFlags
from megatron_cp.megatron.pipeline.costs import caps, equal, given, refuse_cap
from megatron_cp.megatron.run import Settings, has_our_layers
from megatron_cp.pipeline import SCHEDULES
from megatron_cp.pipeline.build import build, check_slices, check_vocabulary, kin, place
from megatron_cp.pipeline.offload import limit_of
from megatron_cp.pipeline.placement import ONE_PIPE
from megatron_cp.pipeline.schedule import MOVE_TARGETS, BadSchedule
from megatron_cp.registry import suggest

AUTO = "auto"


def _over_time(backend: str) -> bool:
    return BACKENDS.get(backend).capabilities.over_time


def _splits_te(args: Any) -> bool:
    te = read(args, "transformer_impl", "transformer_engine") == "transformer_engine"
    return te and PipelineFlags.of(args).splits


def _biases_experts(args: Any) -> bool:
    """True if routers have a bias that each step changes without a gradient."""
    balances = str(read(args, "moe_router_load_balancing_type", ""))
    return bool(read(args, "moe_router_enable_expert_bias", False)) or "quantile_balancing" in balances


UNSUPPORTED = (
    Unsupported(
        "CUDA graphs, which are captured in Megatron's own order",
        captures_graphs,
        "leave --cuda-graph-impl and --enable-cuda-graph out",
    ),
    Unsupported(
        "overlap of expert-parallel communication with weight gradients, which brings an order of its own",
        lambda args: bool(read(args, "overlap_dispatch_backward_with_experts_wgrad", False)),
        "leave --overlap-dispatch-backward-with-experts-wgrad out",
    ),
    Unsupported(
        "Megatron's own delay of weight gradients",
        lambda args: any(read(args, name, False) for name in ("delay_wgrad_compute", "defer_embedding_wgrad_compute")),
        "leave --delay-wgrad-compute and --defer-embedding-wgrad-compute out, a split schedule delays them itself",
    ),
    Unsupported(
        "transformer-engine's overlap of tensor-parallel communication, which cannot delay weight gradients",
        lambda args: _splits_te(args) and bool(read(args, "tp_comm_overlap", False)),
        "pass --transformer-impl local, where --tp-comm-type flux stands in for it, or leave --tp-comm-overlap out, or "
        "take a schedule without W",
    ),
    Unsupported(
        "transformer-engine's fused operations, which delay no weight gradients",
        lambda args: _splits_te(args) and bool(read(args, "use_transformer_engine_op_fuser", False)),
        "leave --use-transformer-engine-op-fuser out, or take a schedule without W",
    ),
    Unsupported(
        "offloading of activations in Megatron's own order",
        lambda args: bool(read(args, "fine_grained_activation_offloading", False)),
        "leave --fine-grained-activation-offloading out",
    ),
    Unsupported(
        "a stash of routed tokens that is replayed",
        lambda args: (
            bool(read(args, "moe_paged_stash", False)) or read(args, "moe_expert_rank_capacity_factor") is not None
        ),
        "leave --moe-paged-stash and --moe-expert-rank-capacity-factor out",
    ),
    Unsupported(
        "Megatron's or torch's fully sharded data parallelism",
        lambda args: any(read(args, name, False) for name in ("use_megatron_fsdp", "use_torch_fsdp2")),
        "use --use-distributed-optimizer",
    ),
)


MOVING_UNSUPPORTED = (
    Unsupported(
        "low precision, whose quantized weights autograd saves beside the activations",
        lambda args: any(read(args, name) is not None for name in ("fp8", "fp4")),
        "leave --fp8-format and --fp4-format out",
    ),
    Unsupported(
        "offloading of layers by transformer-engine, which moves the same activations",
        lambda args: bool(read(args, "cpu_offloading", False)) or bool(read(args, "cpu_offloading_num_layers", 0)),
        "leave --cpu-offloading-num-layers out",
    ),
)

LENDING_UNSUPPORTED = (
    Unsupported(
        "experts with as many tokens as are routed to them, for a peer cannot know the sizes",
        lambda args: bool(read(args, "num_experts")) and not read(args, "moe_pad_expert_input_to_capacity", False),
        "pass --moe-pad-expert-input-to-capacity, or take --pp-offload with --pp-offload-to host",
    ),
)

SLICES_UNSUPPORTED = (
    Unsupported(
        "transformer-engine's overlap of tensor-parallel communication, whose buffers are of whole sequences",
        lambda args: bool(read(args, "tp_comm_overlap", False)),
        "leave --tp-comm-overlap out, or --pp-slices",
    ),
    Unsupported(
        "multi-token prediction, which looks beyond the end of a slice",
        lambda args: bool(read(args, "mtp_num_layers")),
        "leave --mtp-num-layers out",
    ),
    Unsupported(
        "experts, whose auxiliary losses would be of slices",
        lambda args: bool(read(args, "num_experts")),
        "leave --num-experts out, or --pp-slices",
    ),
    Unsupported(
        "a layout of packed documents, which balances whole sequences",
        lambda args: AttentionFlags.of(args).document_layout != STREAM,
        "leave --cp-document-layout out, or --pp-slices",
    ),
    *PARTS_OF_SEQUENCES,
    Unsupported(
        "attention sinks",
        lambda args: read(args, "cp_sink") is not None or read(args, "softmax_type", "vanilla") != "vanilla",
        "leave --cp-sink and --softmax-type out, or --pp-slices",
    ),
    Unsupported(
        "ALiBi",
        lambda args: bool(read(args, "cp_alibi", False)),
        "leave --cp-alibi out, or --pp-slices",
    ),
    Unsupported(
        "dropout of attention weights",
        lambda args: bool(read(args, "attention_dropout", 0.0)) and read(args, "cp_kernel", "auto") != "auto",
        "pass --attention-dropout 0, or leave --pp-slices out",
    ),
    Unsupported(
        "attention in chunks over time, which slices are themselves",
        lambda args: read(args, "cp_chunks") is not None or any(map(_over_time, read(args, "cp_comm_type") or ())),
        "leave --cp-chunks out, and take a --cp-comm-type that has none",
    ),
    Unsupported(
        "an attention other than megatron-cp's",
        lambda args: bool(read(args, "spec")) and not has_our_layers(args),
        "leave --spec out",
    ),
)

VOCABULARY_UNSUPPORTED = (
    Unsupported(
        "weights of which data-parallel ranks hold parts",
        shares_weights_out,
        "leave --gtp-weight-remat-size and fully sharded data parallelism out, or --pp-vocab-parallel",
    ),
    Unsupported(
        "multi-token prediction, whose losses need all logits",
        lambda args: bool(read(args, "mtp_num_layers")),
        "leave --mtp-num-layers out, or --pp-vocab-parallel",
    ),
    Unsupported(
        "output layer and loss in chunks, for no rank has all logits anyway",
        lambda args: read(args, "cp_loss_chunks") is not None,
        "leave --cp-loss-chunks out, or --pp-vocab-parallel",
    ),
    Unsupported(
        "low precision, whose output layer may be transformer-engine's",
        lambda args: any(read(args, name) is not None for name in ("fp8", "fp4")),
        "leave --fp8-format and --fp4-format out, or --pp-vocab-parallel",
    ),
    Unsupported(
        "logits that are saved, or compared with saved ones, for no rank has all of a token",
        lambda args: any(read(args, name) is not None for name in ("logits_save_dir", "logits_load_dir")),
        "leave --logits-save-dir and --logits-load-dir out, or --pp-vocab-parallel",
    ),
    Unsupported(
        "logits that are scaled",
        lambda args: bool(read(args, "use_mup", False)),
        "leave --use-mup out, or --pp-vocab-parallel",
    ),
    Unsupported(
        "models that are built without weights",
        lambda args: bool(read(args, "init_model_with_meta_device", False)),
        "leave --init-model-with-meta-device out, or --pp-vocab-parallel",
    ),
    Unsupported(
        "hybrid models",
        lambda args: bool(read(args, "hybrid_layer_pattern") or read(args, "is_hybrid_model", False)),
        "leave --pp-vocab-parallel out",
    ),
    Unsupported(
        "batches that a plan makes",
        lambda args: read(args, "cp_plan") is not None,
        "leave --cp-plan out, or --pp-vocab-parallel",
    ),
    Unsupported(
        "islands of replicas",
        lambda args: read(args, "local_sgd_steps") is not None,
        "leave --local-sgd-steps out, or --pp-vocab-parallel",
    ),
    Unsupported(
        "checkpoints that keep a rank's weights together, for they hold other rows than without it",
        lambda args: (
            any(read(args, name) for name in ("save", "load"))
            and read(args, "ckpt_format", "torch_dist") != "torch_dist"
        ),
        "leave --ckpt-format out, torch_dist can be loaded with and without it",
    ),
)

UNFLUSHED_UNSUPPORTED = (
    Unsupported(
        "a rerun state machine, for the first forwards of a step that it would run again are gone",
        lambda args: read(args, "rerun_mode", "disabled") != "disabled",
        "pass --rerun-mode disabled",
    ),
    Unsupported(
        "a batch size that changes, for forwards of the next batch come early",
        lambda args: any(read(args, name) is not None for name in ("rampup_batch_size", "step_batch_size_schedule")),
        "leave --rampup-batch-size and --step-batch-size-schedule out",
    ),
    Unsupported(
        "iterations that are left out, for forwards of theirs have run",
        lambda args: bool(read(args, "iterations_to_skip")),
        "leave --iterations-to-skip out",
    ),
    Unsupported(
        "low precision, whose copies of weights are of one version",
        lambda args: any(read(args, name) is not None for name in ("fp8", "fp4")),
        "leave --fp8-format and --fp4-format out",
    ),
    Unsupported(
        "overlapped gathering of weights, which knows the newest version alone",
        lambda args: bool(read(args, "overlap_param_gather", False)),
        "leave --overlap-param-gather out",
    ),
    Unsupported(
        "the distributed optimizer in float32, which updates weights in one place",
        lambda args: (
            bool(read(args, "use_distributed_optimizer", False))
            and not any(read(args, name, False) for name in ("bf16", "fp16"))
        ),
        "pass --bf16, or leave --use-distributed-optimizer out",
    ),
    Unsupported(
        "optimizers that hold the weights themselves",
        lambda args: (
            read(args, "optimizer", "adam") not in ("adam", "sgd")
            or any(read(args, name, False) for name in ("use_precision_aware_optimizer", "optimizer_cpu_offload"))
        ),
        "take --optimizer adam or sgd, without --use-precision-aware-optimizer and --optimizer-cpu-offload",
    ),
    Unsupported(
        "weights that data-parallel ranks share out, or several instances of the distributed optimizer",
        lambda args: shares_weights_out(args) or read(args, "num_distributed_optimizer_instances", 1) > 1,
        "take one --num-distributed-optimizer-instances, and every rank its weights whole",
    ),
    Unsupported(
        "buffers that are registered with NCCL, which are those of one version",
        lambda args: bool(read(args, "nccl_ub", False)),
        "leave --use-nccl-ub out",
    ),
    Unsupported(
        "a bias of experts that each step changes, which is no weight and has no versions",
        _biases_experts,
        "leave --moe-router-enable-expert-bias and quantile_balancing out",
    ),
    Unsupported(
        "copies of experts, whose weights come once in a step",
        lambda args: read(args, "moe_placement", "none") != "none",
        "leave --moe-placement out",
    ),
    Unsupported(
        "checkpoints without room for earlier weights",
        lambda args: (
            any(read(args, name) for name in ("save", "load"))
            and (
                read(args, "ckpt_format", "torch_dist") != "torch_dist"
                or read(args, "non_persistent_ckpt_type") == "local"
            )
        ),
        "leave --ckpt-format and --non-persistent-ckpt-type local out",
    ),
)

V_UNSUPPORTED = (
    Unsupported(
        "multi-token prediction, whose losses Megatron collects on the last rank",
        lambda args: bool(read(args, "mtp_num_layers")),
        "leave --mtp-num-layers out, or take a schedule on the loop",
    ),
    Unsupported(
        "a number of layers for the first or the last rank, whose stages lie elsewhere on the V",
        lambda args: any(
            read(args, f"{which}_pipeline_num_layers") is not None for which in ("decoder_first", "decoder_last")
        ),
        "say the layers of every stage with --pipeline-model-parallel-layout",
    ),
    Unsupported(
        "checkpoints that keep a rank's chunks together, for they hold other layers than on the loop",
        lambda args: (
            any(read(args, name) for name in ("save", "load"))
            and read(args, "ckpt_format", "torch_dist") != "torch_dist"
        ),
        "leave --ckpt-format out, torch_dist can be loaded under any schedule",
    ),
)

WHOLE_STAGE = 1 << 62
"""Elements of a bucket that no stage fills: all of its gradients are in one."""

COPIES_UNSUPPORTED = (
    Unsupported(
        "buckets of gradients beside the distributed optimizer, for Megatron cuts them on the first rank alone",
        lambda args: (
            bool(read(args, "use_distributed_optimizer", False))
            and (read(args, "ddp_num_buckets") is not None or read(args, "ddp_bucket_size") not in (None, WHOLE_STAGE))
        ),
        "leave --ddp-num-buckets and --ddp-bucket-size out, or take zb-v",
    ),
    Unsupported(
        "multi-token prediction, whose losses Megatron collects on the last rank",
        lambda args: bool(read(args, "mtp_num_layers")),
        "leave --mtp-num-layers out, or take a schedule on the loop",
    ),
    Unsupported(
        "a balance of experts that each rank keeps for its own copy",
        _biases_experts,
        "leave --moe-router-enable-expert-bias and quantile_balancing out, or take zb-v",
    ),
    Unsupported(
        "activations that move, for a peer has activations of its own in the same place",
        lambda args: PipelineFlags.of(args).moves_activations,
        "leave --pp-offload out, or take zb-v",
    ),
    Unsupported(
        "islands of data-parallel ranks, for their averages with two copies are not tested",
        lambda args: read(args, "local_sgd_steps") is not None,
        "leave --local-sgd-steps out, or take zb-v",
    ),
    Unsupported(
        "batches that a plan makes, whose numbers of microbatches may be odd",
        lambda args: read(args, "cp_plan") is not None,
        "leave --cp-plan out, or take zb-v",
    ),
    Unsupported(
        "optimizers other than Adam and SGD on one device",
        lambda args: (
            read(args, "optimizer", "adam") not in ("adam", "sgd") or bool(read(args, "optimizer_cpu_offload", False))
        ),
        "take --optimizer adam or sgd, without --optimizer-cpu-offload",
    ),
    Unsupported(
        "models that are built without weights",
        lambda args: bool(read(args, "init_model_with_meta_device", False)),
        "leave --init-model-with-meta-device out, or take zb-v",
    ),
    Unsupported(
        "weights that data-parallel ranks share out",
        shares_weights_out,
        "give every rank its weights whole, or take zb-v",
    ),
    Unsupported(
        "checkpoints that keep a rank's chunks together, for they hold both copies",
        lambda args: (
            any(read(args, name) for name in ("save", "load"))
            and read(args, "ckpt_format", "torch_dist") != "torch_dist"
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
    flags = PipelineFlags.of(args)
    by_placement = 2 if flags.placement == "v" else 1
    chunks = (SCHEDULES.get(flags.schedule).chunks or by_placement) if flags.schedule else 1
    if chunks == 1 or any(read(args, option) is not None for option in SAYS_CHUNKS):
        return 0
    args.num_virtual_stages_per_pipeline_rank = chunks
    return chunks


def imply_buckets(args: Any) -> None:
    """Keep each stage in one bucket of gradients where ranks of a pipeline add up shards of the same stage.

    Megatron cuts the first rank's into several when it overlaps their reduction, and so its shards differ from its
    peer's.
    """
    unsaid = all(read(args, option) is None for option in ("ddp_bucket_size", "ddp_num_buckets"))
    if unsaid and PipelineFlags.of(args).two_copies and read(args, "use_distributed_optimizer", False):
        args.ddp_bucket_size = WHOLE_STAGE


def check_flags(args: Any) -> None:
    """Refuse flags of pipelines that no machine can have together; ValueError with the rule and a way out."""
    flags = PipelineFlags.of(args)
    check_costs(flags)
    size = read(args, "pipeline_model_parallel_size", 1)
    if flags.schedule is not None and size < 2:
        raise Refused(
            f"--pp-schedule {flags.schedule} needs --pipeline-model-parallel-size of at least 2, got {size}; "
            f"leave --pp-schedule out or use more ranks"
        )


def check_schedule(args: Any) -> None:
    """Refuse what `--pp-schedule` names and this run cannot have; ValueError with the rule, the value and a way out."""
    check_flags(args)
    check_free_running(args)
    flags = PipelineFlags.of(args)
    name = flags.schedule
    if name is None:
        return
    on_the_v = V_UNSUPPORTED if flags.on_v else ()
    unflushed = UNFLUSHED_UNSUPPORTED if SCHEDULES.get(name).delay else ()
    copies = COPIES_UNSUPPORTED if flags.two_copies else ()
    refuse((*UNSUPPORTED, *on_the_v, *unflushed, *copies), args, f"--pp-schedule {name}")
    check_combined(args, name)
    if flags.sliced:
        refuse(SLICES_UNSUPPORTED, args, f"--pp-slices {flags.slices}")
    if flags.vocab_parallel is not None:
        refuse(VOCABULARY_UNSUPPORTED, args, f"--pp-vocab-parallel {flags.vocab_parallel}")
    if flags.moves_activations:
        lending = LENDING_UNSUPPORTED if flags.lends else ()
        mover = f"--pp-offload {flags.offload}" if flags.offload else f"--pp-schedule {name}"
        refuse((*MOVING_UNSUPPORTED, *lending), args, mover)


def check_chunks(args: Any) -> None:
    """Refuse chunks per rank that `--pp-schedule` does not have; ValueError with the flag, its value and a way out."""
    name = PipelineFlags.of(args).schedule
    if name is None:
        return
    rule, flag = SCHEDULES.get(name), "--num-virtual-stages-per-pipeline-rank"
    given = read(args, "num_virtual_stages_per_pipeline_rank")
    if given is None or rule.chunks in (None, given):
        return
    raise Refused(
        f"--pp-schedule {name} has {rule.chunks} {'chunk' if rule.chunks == 1 else 'chunks'} per rank, got {flag} "
        f"{given}; take it back by {flag}=false, or take --pp-schedule {kin(rule, given)}"
    )


def check_costs(flags: PipelineFlags) -> None:
    """Refuse what the flags beside `--pp-schedule` cannot mean together; ValueError in one line."""
    name, file, steps = flags.schedule, flags.costs, flags.profile_steps
    limit, placement = flags.memory_limit, flags.placement
    for flag, value in (("--pp-placement", placement), ("--pp-costs", file), ("--pp-profile-steps", steps)):
        if value is not None and name != AUTO:
            raise Refused(f"{flag} {value} needs --pp-schedule {AUTO}, got {name or 'none'}; leave one of the two out")
    if placement is not None and placement not in ONE_PIPE:
        raise Refused(
            f"unknown --pp-placement {placement!r}{suggest(placement, ONE_PIPE)}; known: {', '.join(ONE_PIPE)}"
        )
    if steps is not None and steps < 2:
        raise Refused(f"--pp-profile-steps must be 2 or more, the first step only warms up, got {steps}")
    if limit is not None and name is None:
        raise Refused(f"--pp-memory-limit {limit:g} needs --pp-schedule; leave it out")
    if limit is not None and not limit > 0:
        raise Refused(f"--pp-memory-limit is a positive number of M_B, got {limit:g}")
    _check_moves(flags)
    if flags.slices is not None:
        if name is None:
            raise Refused(f"--pp-slices {flags.slices} needs --pp-schedule; add 1f1b, or leave it out")
        check_slices(SCHEDULES.get(name), flags.slices)
    if flags.vocab_parallel is not None:
        _check_vocabulary(flags)
    if name == AUTO and (file is None) == (steps is None):
        raise Refused(
            f"--pp-schedule {AUTO} schedules from times: give one of --pp-costs FILE and "
            f"--pp-profile-steps 10, got {'none' if file is None else 'both'}"
        )


def _check_moves(flags: PipelineFlags) -> None:
    name, limit, to = flags.schedule, flags.offload, flags.offload_to
    if limit is None:
        if to is not None:
            raise Refused(f"--pp-offload-to {to} is about what --pp-offload N moves; give it too")
        return
    if name is None:
        raise Refused(f"--pp-offload {limit} needs --pp-schedule; add one, or leave it out")
    if to not in (None, *MOVE_TARGETS):
        raise Refused(
            f"unknown --pp-offload-to {to!r}{suggest(to or '', MOVE_TARGETS)}; known: {', '.join(MOVE_TARGETS)}"
        )
    if limit_of(limit) is None and flags.memory_limit is None:
        raise Refused(f"--pp-offload {limit} fits --pp-memory-limit, got none; give it, or a number of chunks")


def _check_vocabulary(flags: PipelineFlags) -> None:
    name, barriers = flags.schedule, flags.vocab_parallel
    assert barriers is not None
    if name is None:
        raise Refused(f"--pp-vocab-parallel {barriers} needs --pp-schedule; add 1f1b, or leave it out")
    try:
        check_vocabulary(SCHEDULES.get(name), barriers, flags.slices or 1, flags.moves)
    except Refused as refused:
        raise Refused(f"--pp-vocab-parallel {barriers}: {refused}") from None


def check_table(args: Any) -> None:
    """Refuse sizes that `--pp-schedule` has no table for, once Megatron has worked them out; ValueError in one line."""
    settings = Settings.of(args)
    name = settings.pipeline.schedule
    if name is None:
        return
    rule, chunks = SCHEDULES.get(name), read(args, "virtual_pipeline_model_parallel_size") or 1
    if rule.table and rule.chunks is None and chunks == 1:
        raise Refused(
            f"--pp-schedule {name} needs more than one chunk per rank, got 1; "
            f"add --num-virtual-stages-per-pipeline-rank 2 or take zb-h1"
        )
    placement = place(rule, args.pipeline_model_parallel_size, chunks, settings.pipeline.placement)
    known = given(settings, placement) or equal(placement, settings.slice_lengths)
    refuse_cap(settings, placement, known.costs)
    if rule.table is None:
        return
    evaluated = _evaluated(args) if rule.two_copies else []
    for micros in evaluated:
        if micros % 2:
            raise Refused(
                f"--pp-schedule {name} sends half of the microbatches down the ranks and half up, got {micros} in an "
                f"evaluation (--eval-global-batch-size {args.eval_global_batch_size}); take an even number of them"
            )
    for micros in micros_of(args):
        try:
            build(
                name,
                placement.ranks,
                micros,
                chunks,
                costs=known.costs,
                caps=caps(settings, placement),
                moves=settings.pipeline.moves,
                slices=settings.pipeline.slices or 1,
                barriers=settings.pipeline.vocab_parallel or 0,
            )
        except BadSchedule as bad:
            raise Refused(f"--pp-schedule {name} {bad.reason}") from bad
        except ValueError as error:
            raise Refused(f"--pp-schedule {name}: {error}") from None


def _evaluated(args: Any) -> list[int]:
    """Return the number of microbatches of an evaluation, where the run has any."""
    if not (read(args, "eval_iters") or read(args, "full_validation")):
        return []
    return [args.eval_global_batch_size // (args.data_parallel_size * args.eval_micro_batch_size)]


def micros_of(args: Any) -> list[int]:
    """Return every number of microbatches that a step of the run can have, once each."""
    # ranks that share out a weight have microbatches of their own
    share = args.micro_batch_size * args.data_parallel_size * read(args, "gtp_weight_remat_size", 1)
    batches = read(args, "step_batch_size_schedule")
    if batches is None:
        return [args.global_batch_size // share]
    from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

    # the calculator prints its steps on rank 0
    silent = -1
    with as_refusals():
        sizes = StepBatchsizeNumMicroBatchesCalculator(share, 1, False, silent, batches, args.seq_length).schedule
    # Megatron refuses a size below one microbatch per rank when that step comes
    return sorted({size // share for _, size in sizes if size >= share})
