"""Extend Megatron's parser and checks: add flags, fill in values for the machine, refuse in one line."""

import functools
import re
import sys
from collections.abc import Callable
from typing import Any

import torch

from megatron_cp.context.auto import default_cluster
from megatron_cp.corpus import conversations
from megatron_cp.errors import Refused, as_refusals, refuse_together
from megatron_cp.megatron import dataset
from megatron_cp.megatron.arguments.batches import check_plan, imply_loader
from megatron_cp.megatron.arguments.command_line import HYBRID_SPEC, SPEC, wants_layers
from megatron_cp.megatron.arguments.context import add_arguments, check
from megatron_cp.megatron.arguments.expert_groups import check_groups, imply_groups
from megatron_cp.megatron.arguments.experts import (
    check_cluster,
    check_exchange,
    check_experts,
    check_layers,
    check_router,
    imply_dispatcher,
    imply_layers,
    imply_pieces,
)
from megatron_cp.megatron.arguments.foreign_flags import instead_of
from megatron_cp.megatron.arguments.on_disk import check_on_disk, check_state_dir
from megatron_cp.megatron.arguments.pipeline import (
    check_chunks,
    check_schedule,
    check_table,
    imply_buckets,
    imply_chunks,
)
from megatron_cp.megatron.arguments.placement import check_placement
from megatron_cp.megatron.arguments.quantised import check_quantised, complete_quantised
from megatron_cp.megatron.arguments.replicas import check_local_sgd, complete_local_sgd
from megatron_cp.megatron.arguments.tensor import check_tensor, settle_tensor, stand_in_for_overlap
from megatron_cp.megatron.arguments.tiles import check_tiles
from megatron_cp.megatron.arguments.tuning import check_degrees, check_tuning, settle_exchange
from megatron_cp.megatron.arguments.upstream_faults import refuse_upstream_faults
from megatron_cp.megatron.checkpoint import resume
from megatron_cp.megatron.machine.facts import Machine, this_machine
from megatron_cp.megatron.run import has_our_layers, say


def add_megatron_arguments(old: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return Megatron's parser with our flags, a help that can be printed, and errors in one line."""
    parser = old(*args, **kwargs)
    add_arguments(parser)
    _mend_help(parser)
    parser.error = functools.partial(_refuse_words, parser)
    return parser


def _mend_help(parser: Any) -> None:
    # one of Megatron's help texts ends in a bare per cent sign, which makes --help fail
    for action in parser._actions:
        if action.help:
            action.help = re.sub(r"%%|%(?!\()", "%%", action.help)


def _refuse_words(parser: Any, message: str) -> None:
    unknown = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
    known = parser._option_string_actions
    hints = [instead_of(flag, known) for flag in unknown if flag not in known] if "unrecognized" in message else []
    raise Refused(message + "".join(hints))


def validate_args(old: Callable[..., Any], args: Any, *rest: Any, **kwargs: Any) -> Any:
    """Fill in and check the parsed arguments on this machine, ours and Megatron's; raises Refused with one line."""
    return validate_for(this_machine(), old, args, *rest, **kwargs)


def validate_for(machine: Machine, old: Callable[..., Any], args: Any, *rest: Any, **kwargs: Any) -> Any:
    """Fill in and check the parsed arguments of a run on `machine`; `old` is Megatron's own validate_args."""
    complete(args, machine)
    # before Megatron's checks, for ours say more than a bare assertion
    refuse_together(
        lambda: check(args) if has_our_layers(args) else None,
        lambda: check_schedule(args),
        lambda: check_plan(args),
        lambda: check_chunks(args),
        lambda: check_cluster(args),
        lambda: check_degrees(args),
    )
    default = functools.partial(default_cluster, "cuda" if machine.gpu and torch.cuda.is_available() else "cpu")
    settle_tensor(args, default)
    settle_exchange(args, default)
    check_tensor(args)
    check_experts(args)
    check_exchange(args)
    check_tuning(args)
    check_groups(args)
    check_placement(args)
    check_router(args)
    check_layers(args)
    refuse_upstream_faults(args, machine.te)
    with as_refusals():
        result = old(args, *rest, **kwargs)
    check_local_sgd(args)
    check_quantised(args)
    check_on_disk(args)
    check_tiles(args)
    check_table(args)
    if machine.inputs:
        check_inputs(args)
    return result


def complete(args: Any, machine: Machine) -> None:
    """Fill in what `machine` and our layers need of parsed arguments, before Megatron validates them."""
    if args.spec is None and wants_layers(sys.argv[1:], machine.te):
        args.spec = list(HYBRID_SPEC if getattr(args, "hybrid_layer_pattern", None) else SPEC)
    if has_our_layers(args) and args.create_attention_mask_in_dataloader:
        args.create_attention_mask_in_dataloader = False
        say("our attention reads no mask tensor: --no-create-attention-mask-in-dataloader")
    if note := note_on_positions(args):
        say(note)
    imply_loader(args)
    imply_pieces(args)
    imply_groups(args)
    imply_dispatcher(args)
    imply_layers(args)
    complete_local_sgd(args)
    complete_quantised(args)
    if chunks := imply_chunks(args):
        say(f"--pp-schedule {args.pp_schedule}: --num-virtual-stages-per-pipeline-rank {chunks}")
    imply_buckets(args)
    if args.async_save and args.async_strategy == "nvrx" and not (machine.gpu and machine.nvrx):
        args.async_strategy = "mcore"
        say("no GPU with nvidia-resiliency-ext here: --async-strategy mcore")
    _refuse_without_te(args, machine)
    _refuse_without_gpu(args, machine)
    overlaps = getattr(args, "tp_comm_overlap", False)
    if changed := fill_arguments(args, machine):
        say(f"this machine has no {'transformer-engine' if machine.gpu else 'GPU'}: {' '.join(changed)}")
    if overlaps and args.transformer_impl == "local":
        stand_in_for_overlap(args)


def note_on_positions(args: Any) -> str:
    """Say that positions which restart change no score; empty where they may."""
    if getattr(args, "reset_position_ids", False) and getattr(args, "position_embedding_type", "") == "rope":
        return "--reset-position-ids has no effect on rotary positions, which give scores by distances alone"
    return ""


def _refuse_without_te(args: Any, machine: Machine) -> None:
    latent = getattr(args, "multi_latent_attention", False)
    if latent and not machine.te and not has_our_layers(args):
        raise Refused(
            "--multi-latent-attention of stock Megatron needs transformer-engine, which is not installed; install it "
            "or leave the flag out"
        )
    for name, value, _ in LOW_PRECISION if machine.gpu and not machine.te else ():
        if getattr(args, name, value) != value:
            flag = "fp8-format" if name == "fp8" else "fp4-format" if name == "fp4" else name.replace("_", "-")
            raise Refused(
                f"--{flag} needs transformer-engine, which is not installed; install it or leave the flag out"
            )


def _refuse_without_gpu(args: Any, machine: Machine) -> None:
    flex = getattr(args, "moe_token_dispatcher_type", None) == "flex"
    if flex and getattr(args, "num_experts", None) and not machine.gpu:
        raise Refused(
            "--moe-token-dispatcher-type flex sends tokens by kernels for GPUs (DeepEP, HybridEP, NCCL EP), and this "
            "machine has none; pass --moe-token-dispatcher-type alltoall"
        )


def check_inputs(args: Any) -> None:
    """Refuse data or a checkpoint that cannot be read, before anything is built; ValueError says what and why."""
    check_state_dir(args)
    resume.check(args)
    if not args.mock_data:
        sft = getattr(args, "sft", False)
        given = (args.data_path, args.train_data_path, args.valid_data_path, args.test_data_path)
        for prefixes in filter(None, given):
            if sft:
                conversations.check_conversations(prefixes)
                continue
            found = dataset.check_data_path(prefixes)
            if prefixes is args.data_path:
                evaluates = bool(args.eval_iters) and not args.full_validation
                dataset.check_split(found, args.split, evaluates, only_train=args.full_validation)


# The plain implementation of what is otherwise a kernel of transformer-engine or Apex: (name, value, the flag for it).
# None changes what is computed, so one recipe serves machines with and without them.
WITHOUT_TE: tuple[tuple[str, Any, str], ...] = (
    ("transformer_impl", "local", "--transformer-impl local"),
    ("apply_rope_fusion", False, "--no-rope-fusion"),
    ("no_persist_layer_norm", True, "--no-persist-layer-norm"),
    ("gradient_accumulation_fusion", False, "--no-gradient-accumulation-fusion"),
    ("masked_softmax_fusion", False, "--no-masked-softmax-fusion"),
    ("moe_permute_fusion", False, "no --moe-permute-fusion"),
    ("moe_router_fusion", False, "no --moe-router-fusion"),
    ("tp_comm_overlap", False, "no --tp-comm-overlap"),
)
# What transformer-engine alone computes in lower precision, for a GPU; a CPU computes it in the model's.
LOW_PRECISION: tuple[tuple[str, Any, str], ...] = (
    ("fp8", None, "no --fp8-format"),
    ("fp8_param_gather", False, "no --fp8-param-gather"),
    ("fp4", None, "no --fp4-format"),
    ("fp4_param_gather", False, "no --fp4-param-gather"),
    ("use_precision_aware_optimizer", False, "no --use-precision-aware-optimizer"),
    ("main_grads_dtype", "fp32", "--main-grads-dtype fp32"),
    ("main_params_dtype", "fp32", "--main-params-dtype fp32"),
    ("exp_avg_dtype", "fp32", "--exp-avg-dtype fp32"),
    ("exp_avg_sq_dtype", "fp32", "--exp-avg-sq-dtype fp32"),
    ("optimizer_cpu_offload", False, "no --optimizer-cpu-offload"),
)
# Likewise for compiled or CUDA kernels of torch and Megatron themselves.
WITHOUT_GPU: tuple[tuple[str, Any, str], ...] = (
    ("distributed_backend", "gloo", "--distributed-backend gloo"),
    ("use_cpu_initialization", True, "--use-cpu-initialization"),
    ("bias_swiglu_fusion", False, "--no-bias-swiglu-fusion"),
    ("bias_gelu_fusion", False, "--no-bias-gelu-fusion"),
    ("bias_dropout_fusion", False, "--no-bias-dropout-fusion"),
    ("cross_entropy_loss_fusion", False, "no --cross-entropy-loss-fusion"),
    ("nccl_ub", False, "no --use-nccl-ub"),
    ("fsdp_manual_registration", False, "no --fsdp-manual-registration"),
    # a forked worker would inherit gloo's threads in the middle of whatever they do
    ("num_workers", 0, "--num-workers 0"),
)


# Of sharded data parallelism, where it is asked for.
FSDP_WITHOUT_GPU: tuple[tuple[str, Any, str], ...] = (
    ("gradient_reduce_div_fusion", False, "--no-gradient-reduce-div-fusion"),
)


def fill_arguments(args: Any, machine: Machine) -> list[str]:
    """Set in parsed `args` what `machine` needs; return the flags that say the same, for those that differed."""
    needed = (() if machine.te and machine.gpu else WITHOUT_TE) + (() if machine.gpu else LOW_PRECISION + WITHOUT_GPU)
    needed += FSDP_WITHOUT_GPU if getattr(args, "use_megatron_fsdp", False) and not machine.gpu else ()
    changed = [entry for entry in needed if getattr(args, entry[0], entry[1]) != entry[1]]
    for name, value, _ in changed:
        setattr(args, name, value)
    return [flag for *_, flag in changed]
