"""The run that this process is part of: its command line, its settings and its own log lines.

`Settings` is all that our layers and schedules read of Megatron's parsed arguments.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Self

from megatron_cp import config
from megatron_cp.errors import Refused
from megatron_cp.megatron.flags.context import AttentionFlags
from megatron_cp.megatron.flags.experts import ExpertFlags
from megatron_cp.megatron.flags.pipeline import PipelineFlags
from megatron_cp.megatron.flags.replicas import LocalSgdFlags, MlpFlags, QuantisedFlags, StateFlags
from megatron_cp.megatron.flags.tensor import TensorFlags
from megatron_cp.pipeline import SCHEDULES
from megatron_cp.pipeline.costs_file import Model
from megatron_cp.pipeline.slices import model_lengths

READING = (
    ("save_interval", "save"),
    ("non_persistent_save_interval", "save"),
    ("save_params_interval", "save"),
    ("exit_interval", None),
    ("eval_interval", "eval_iters"),
    ("check_weight_hash_across_dp_replicas_interval", None),
)
"""Intervals of what reads the weights, each with the argument without which it is never reached."""


def reading(args: Any) -> dict[str, int]:
    """Return the arguments by which weights are read every so many steps, with the number."""
    found = {name: getattr(args, name, None) for name, needs in READING if not needs or getattr(args, needs, None)}
    return {name: every for name, every in found.items() if every}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Values of Megatron's arguments for our layers and schedules, read where Megatron calls us and handed down.

    our_layers:          --spec names a layer spec of ours
    attention, tensor, experts: None where the parser was without our flags, and a config keeps what it says itself
    seq_length:          tokens of a sequence over all ranks, for which `--cp-comm-type auto` chooses
    slice_lengths:       tokens of each slice of a sequence over all ranks; empty for whole sequences
    rope_scaling_factor: of --rope-scaling-factor, which Megatron does not hand on to the model
    model:               what measured costs hold for; None where the run neither measures nor reads any
    rank:                in the whole run
    save, load:          folders of the checkpoints that are written, and that the run goes on from
    log_interval:        steps from one of Megatron's log lines to the next; None where it is not said
    steps:               numbers of the steps to run, from the loaded checkpoint's on; None where no end is known
    read_every:          numbers of steps after each of which the weights are read: saved, evaluated, compared
    timeout_minutes:     of communication
    combines:            forwards run beside backwards, whose exchanges between experts they hide
    """

    our_layers: bool = False
    attention: AttentionFlags | None = None
    pipeline: PipelineFlags = field(default_factory=PipelineFlags)
    tensor: TensorFlags | None = None
    experts: ExpertFlags | None = None
    local_sgd: LocalSgdFlags = field(default_factory=LocalSgdFlags)
    quantised: QuantisedFlags = field(default_factory=QuantisedFlags)
    optimizer_state: StateFlags = field(default_factory=StateFlags)
    mlp: MlpFlags = field(default_factory=MlpFlags)
    seq_length: int | None = None
    rope_scaling_factor: float | None = None
    slice_lengths: tuple[int, ...] = ()
    model: Model | None = None
    rank: int = 0
    save: str | None = None
    load: str | None = None
    log_interval: int | None = None
    steps: range | None = None
    read_every: tuple[int, ...] = ()
    timeout_minutes: int | None = None
    combines: bool = False

    @classmethod
    def of(cls, args: Any) -> Self:
        """Read parsed arguments once Megatron has validated them."""
        flags = PipelineFlags.of(args)
        return cls(
            our_layers=has_our_layers(args),
            attention=AttentionFlags.of(args) if hasattr(args, "cp_kernel") else None,
            pipeline=flags,
            tensor=TensorFlags.of(args) if hasattr(args, "tp_comm_type") else None,
            experts=ExpertFlags.of(args) if hasattr(args, "moe_grouped_product") else None,
            local_sgd=LocalSgdFlags.of(args),
            quantised=QuantisedFlags.of(args),
            optimizer_state=StateFlags.of(args),
            mlp=MlpFlags.of(args),
            seq_length=getattr(args, "seq_length", None),
            rope_scaling_factor=getattr(args, "rope_scaling_factor", None),
            slice_lengths=_slice_lengths(args, flags) if flags.sliced and flags.schedule else (),
            model=_model_of(args) if flags.costs or flags.profile_steps else None,
            rank=getattr(args, "rank", 0),
            save=getattr(args, "save", None),
            load=getattr(args, "load", None),
            log_interval=getattr(args, "log_interval", None),
            steps=_steps_of(args),
            read_every=tuple(reading(args).values()),
            timeout_minutes=getattr(args, "distributed_timeout_minutes", None),
            combines=flags.schedule is not None and getattr(args, "overlap_moe_expert_parallel_comm", False),
        )


def _steps_of(args: Any) -> range | None:
    last = getattr(args, "train_iters", None)
    return None if last is None else range(getattr(args, "iteration", 0), last)


def _slice_lengths(args: Any, flags: PipelineFlags) -> tuple[int, ...]:
    """Return the tokens of each slice, so that slices cost about the same; ValueError where one would be empty."""
    hidden, heads, cp = args.hidden_size, args.num_attention_heads, args.context_parallel_size
    dim = getattr(args, "kv_channels", None) or hidden // heads
    groups = args.num_query_groups if getattr(args, "group_query_attention", False) else heads
    matrices = 3 if getattr(args, "swiglu", False) or getattr(args, "quick_geglu", False) else 2
    mlp = matrices * hidden * (getattr(args, "ffn_hidden_size", None) or 4 * hidden)
    parameters = 2 * hidden * dim * (heads + groups) + mlp
    split = SCHEDULES.get(flags.schedule or "").split
    spread = args.tensor_model_parallel_size if getattr(args, "sequence_parallel", False) else 1
    multiple = math.lcm(2 * cp, cp * getattr(args, "cp_stripe", 1), cp * spread)
    try:
        return _lengths(flags.slices or 1, args.seq_length, multiple, parameters, heads * dim, split)
    except ValueError as error:
        raise Refused(f"--pp-slices {flags.slices}: {error}") from None


# asked again by every hook that is called in a step
@lru_cache(32)
def _lengths(*sizes: Any) -> tuple[int, ...]:
    return tuple(model_lengths(*sizes))


def _model_of(args: Any) -> Model:
    uneven = (
        args.pipeline_model_parallel_layout,
        args.decoder_first_pipeline_num_layers,
        args.decoder_last_pipeline_num_layers,
    )
    return Model(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size or 1,
        expert_model_parallel_size=args.expert_model_parallel_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_experts=args.num_experts or 0,
        params_dtype=str(args.params_dtype).removeprefix("torch."),
        recompute_granularity=args.recompute_granularity or "none",
        layout=next((str(value) for value in uneven if value is not None), "even"),
    )


def settings_of_run() -> Settings:
    """Return the settings of this process's run; defaults in a program that has parsed no arguments of Megatron's.

    Megatron calls a layer spec, and most functions that we replace, without its arguments, so that they can only be
    found where it keeps them for the whole process. Two places ask here and hand the settings down: hooks.py for the
    functions of ours that it calls, and the layer specs, which also run without hooks.
    """
    args = args_of_run()
    return Settings() if args is None else Settings.of(args)


def args_of_run() -> Any:
    """Return the arguments that Megatron keeps for this process, None in a program that has parsed none."""
    # a program that never imported megatron.training has none, and importing it here would cost seconds
    if "megatron.training.global_vars" not in sys.modules:
        return None
    return sys.modules["megatron.training.global_vars"]._GLOBAL_ARGS


def values_of(argv: Sequence[str], flag: str) -> list[str] | None:
    """Return what follows the last `flag` on the command line, up to the next flag; None without the flag."""
    found: list[str] | None = None
    taking = False
    for word in argv:
        name, equals, value = word.partition("=")
        if name == flag:
            found, taking = [value] if equals else [], not equals
        elif word.startswith("--"):
            taking = False
        elif taking and found is not None:
            found.append(word)
    return found


def packs_documents(args: Any) -> bool:
    """True if a sample is a stream of documents that see only themselves."""
    by_flag = getattr(args, "dataloader_inter_document_masking", False) or getattr(args, "sft", False)
    return bool(by_flag or cuts_at_eod(args))


def plans_batches(args: Any) -> bool:
    """True if every microbatch has groups of its own."""
    return getattr(args, "cp_plan", None) is not None


def cuts_at_eod(args: Any) -> bool:
    """True if documents end at EOD tokens, which stock layers read from a mask tensor and ours from the data."""
    return bool(getattr(args, "reset_attention_mask", False)) and has_our_layers(args)


def has_our_layers(args: Any) -> bool:
    """True if the arguments name a layer spec of ours."""
    spec = getattr(args, "spec", None) or [""]
    return bool(spec[0].startswith("megatron_cp."))


def say(text: str) -> None:
    """Print our own line, once per run."""
    if config.variable("RANK", "0") == "0":
        print(f"[megatron-cp] {text}", flush=True)
