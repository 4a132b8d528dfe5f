"""Checks of --cp-plan, before the model is built."""

from typing import Any

from megatron_cp.batches import ALGORITHMS
from megatron_cp.context import AUTO as AUTO_BACKEND
from megatron_cp.context import BACKENDS
from megatron_cp.context.document_layouts import AUTO as AUTO_LAYOUT
from megatron_cp.errors import Refused
from megatron_cp.megatron.arguments.context import comm_types
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
from megatron_cp.megatron.run import has_our_layers, plans_batches
from megatron_cp.pipeline import SCHEDULES

EXTERNAL = "external"
"""Megatron's --dataloader-type for data that comes as an iterator."""


def _asks(name: str) -> Any:
    return lambda args: bool(read(args, name))


def _differs(name: str, value: Any) -> Any:
    return lambda args: read(args, name, value) not in (None, value)


AUXILIARY = ("aux_loss", "seq_aux_loss", "global_aux_loss")
"""Ways to balance experts by a loss, which without a coefficient do nothing."""


def _has_experts(args: Any) -> bool:
    return bool(read(args, "num_experts"))


def _balances_microbatches(args: Any) -> bool:
    """Return True if what a router does to a token, or to the loss, depends on the tokens beside it."""
    kinds, coefficients = (
        value if isinstance(value, list) else [value]
        for value in (read(args, "moe_router_load_balancing_type", "aux_loss"), read(args, "moe_aux_loss_coeff", 0.0))
    )
    others = ("z_loss_coeff", "input_jitter_eps", "expert_capacity_factor", "router_enable_expert_bias")
    return (
        not {*kinds} <= {"none", *AUXILIARY}
        or (not {*kinds} <= {"none"} and any(coefficients))
        or any(read(args, f"moe_{name}") for name in (*others, "router_force_load_balancing"))
    )


UNSUPPORTED = (
    Unsupported(
        "one context-parallel size for all microbatches beside groups of their own",
        _differs("context_parallel_size", 1),
        "pass --context-parallel-size 1",
    ),
    Unsupported(
        "dropout of attention weights, which would be others for each plan",
        _asks("attention_dropout"),
        "pass --attention-dropout 0",
    ),
    Unsupported(
        "several samples in a microbatch, which holds what the plan gives its group",
        _differs("micro_batch_size", 1),
        "pass --micro-batch-size 1",
    ),
    Unsupported(
        "losses divided by the tokens of each microbatch, which differ",
        lambda args: not read(args, "calculate_per_token_loss", False),
        "pass --calculate-per-token-loss",
    ),
    Unsupported("layers other than megatron-cp's", lambda args: not has_our_layers(args), "leave --spec out"),
    Unsupported(
        "mock data, which has no documents",
        _asks("mock_data"),
        "pass --data-path PREFIX of a corpus, as megatron-cp data writes it",
    ),
    Unsupported(
        "conversations, whose lengths are in no index",
        _asks("sft"),
        "leave --sft out, and pass --data-path PREFIX of a corpus",
    ),
    Unsupported(
        "data paths other than one --data-path PREFIX",
        lambda args: (
            any(read(args, f"{part}_data_path") for part in ("train", "valid", "test"))
            or bool(read(args, "data_args_path") or read(args, "per_split_data_args_path"))
            or len(read(args, "data_path") or ()) != 1
        ),
        "write the documents of all into one corpus",
    ),
    Unsupported(
        "flags that say where documents end, which see only themselves in any case",
        lambda args: any(
            read(args, name)
            for name in ("dataloader_inter_document_masking", "reset_attention_mask", "reset_position_ids")
        ),
        "leave --dataloader-inter-document-masking, --reset-attention-mask and --reset-position-ids out",
    ),
    Unsupported("a loss without EOD tokens", _asks("eod_mask_loss"), "leave --eod-mask-loss out"),
    Unsupported(
        "data loaders of Megatron's own",
        _differs("dataloader_type", EXTERNAL),
        "leave --dataloader-type out",
    ),
    Unsupported(
        "numbers of documents that change between steps",
        lambda args: any(
            read(args, name)
            for name in ("rampup_batch_size", "step_batch_size_schedule", "decrease_batch_size_if_needed")
        ),
        "leave --rampup-batch-size, --step-batch-size-schedule and --decrease-batch-size-if-needed out",
    ),
    Unsupported(
        "steps that are skipped, or phases",
        lambda args: bool(read(args, "iterations_to_skip") or read(args, "phase_transition_iterations")),
        "leave --iterations-to-skip and --phase-transition-iterations out",
    ),
    Unsupported(
        "validation over a whole set, or several of them",
        lambda args: bool(read(args, "full_validation") or read(args, "multiple_validation_sets")),
        "leave --full-validation and --multiple-validation-sets out",
    ),
    Unsupported(
        "multi-token prediction, which looks beyond a rank's tokens",
        _asks("mtp_num_layers"),
        "leave --mtp-num-layers out",
    ),
    Unsupported(
        "experts whose load is balanced over the tokens of a microbatch, which are others for each plan",
        lambda args: _has_experts(args) and _balances_microbatches(args),
        "pass --moe-router-load-balancing-type none, without --moe-z-loss-coeff, --moe-router-enable-expert-bias, "
        "--moe-expert-capacity-factor and --moe-input-jitter-eps",
    ),
    Unsupported(
        "experts of several ranks that gather equal numbers of tokens",
        lambda args: (
            _has_experts(args)
            and read(args, "expert_model_parallel_size", 1) > 1
            and read(args, "moe_token_dispatcher_type", "allgather") != "alltoall"
        ),
        "pass --moe-token-dispatcher-type alltoall",
    ),
    Unsupported(
        "messages of experts that overlap other microbatches",
        _asks("overlap_moe_expert_parallel_comm"),
        "leave --overlap-moe-expert-parallel-comm out",
    ),
    *PARTS_OF_SEQUENCES,
    Unsupported("CUDA graphs, which are captured for one shape", captures_graphs, "leave --cuda-graph-impl out"),
    Unsupported(
        "weights that data-parallel ranks share out, which they gather in step",
        shares_weights_out,
        "use --use-distributed-optimizer",
    ),
    Unsupported("slices of sequences", lambda args: PipelineFlags.of(args).sliced, "leave --pp-slices out"),
    Unsupported(
        "activations that move between forward and backward, whose sizes differ",
        lambda args: PipelineFlags.of(args).schedule is not None and PipelineFlags.of(args).moves_activations,
        "leave --pp-offload out, and take a --pp-schedule other than bpipe",
    ),
    Unsupported(
        "attention in chunks over time",
        lambda args: AttentionFlags.of(args).chunks is not None,
        "leave --cp-chunks out",
    ),
)


def check_plan(args: Any) -> None:
    """Refuse what `--cp-plan` names and this run cannot have; ValueError with the rule, the value and a way out."""
    flags = AttentionFlags.of(args)
    if flags.plan is None:
        if flags.tokens_per_rank is not None:
            raise Refused(
                f"--cp-tokens-per-rank {flags.tokens_per_rank} needs --cp-plan; leave it out, or add balanced"
            )
        return
    entry = ALGORITHMS.get(flags.plan)
    refuse(UNSUPPORTED, args, f"--cp-plan {entry.name}")
    _check_backend(args, entry.name)
    _check_pipeline(args, entry.name)


def _check_backend(args: Any, plan: str) -> None:
    names = comm_types(args)
    if len(set(names)) > 1:
        raise Refused(f"--cp-plan {plan} prices one --cp-comm-type for all layers, got {', '.join(names)}; pass one")
    entry = BACKENDS.get(names[0])
    if entry.name == AUTO_BACKEND or entry.needs_grid or entry.capabilities.over_time:
        raise Refused(
            f"--cp-plan {plan} forms groups of any size, got --cp-comm-type {entry.name}, which chooses for one size, "
            f"needs a grid of ranks or cuts sequences over time; take zigzag or all-gather"
        )
    if AttentionFlags.of(args).document_layout == AUTO_LAYOUT:
        raise Refused(f"--cp-plan {plan} takes one --cp-document-layout for all, got auto; take stream or blocks")


def _check_pipeline(args: Any, plan: str) -> None:
    stages, name = read(args, "pipeline_model_parallel_size", 1), PipelineFlags.of(args).schedule
    if stages > 1 and name is None:
        raise Refused(
            f"--cp-plan {plan} with --pipeline-model-parallel-size {stages} needs a schedule that knows the length of "
            f"each microbatch; add --pp-schedule 1f1b"
        )
    rule = None if name is None else SCHEDULES.get(name)
    if rule and (rule.table is None or rule.delay or name == NEEDS_SLOTS):
        raise Refused(
            f"--cp-plan {plan} makes steps of few and of unlike microbatches, got --pp-schedule {name}, which asks for "
            f"their number or their times; take 1f1b, interleaved, zb-h1 or zb-v"
        )


NEEDS_SLOTS = "dualpipe-v"
"""The schedule that has no table for few microbatches."""


def imply_loader(args: Any) -> None:
    """Let Megatron take the steps of a plan as they come."""
    if plans_batches(args) and read(args, "dataloader_type") is None:
        args.dataloader_type = EXTERNAL
