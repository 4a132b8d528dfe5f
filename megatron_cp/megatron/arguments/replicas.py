"""Checks of the flags for Local SGD, once Megatron has worked out its sizes."""

from typing import Any

from megatron_cp.errors import Refused
from megatron_cp.megatron.arguments.unsupported import (
    OTHER_THAN_ADAM,
    OTHER_UPDATES,
    WEIGHTS_SHARED_OUT,
    Unsupported,
    read,
    refuse,
)
from megatron_cp.megatron.flags.pipeline import PipelineFlags
from megatron_cp.megatron.flags.replicas import LocalSgdFlags
from megatron_cp.megatron.run import reading, say
from megatron_cp.pipeline import SCHEDULES
from megatron_cp.replicas.sync_steps import Phase, phases_of, syncs


def without_flush(args: Any) -> bool:
    """Return True for a pipeline schedule that keeps earlier weights."""
    schedule = PipelineFlags.of(args).schedule
    return schedule is not None and SCHEDULES.get(schedule).delay is not None


UNSUPPORTED = (
    WEIGHTS_SHARED_OUT,
    OTHER_THAN_ADAM,
    Unsupported(
        "loss scales, which the islands would change apart",
        lambda args: bool(read(args, "fp16", False)),
        "pass --bf16 in the place of --fp16",
    ),
    Unsupported(
        "per-token losses, whose count of tokens is of all islands",
        lambda args: bool(read(args, "calculate_per_token_loss", False)),
        "leave --calculate-per-token-loss out",
    ),
    Unsupported(
        "experts, which other ranks share than the rest of the model",
        lambda args: bool(read(args, "num_experts")),
        "leave --num-experts out",
    ),
    *OTHER_UPDATES,
    Unsupported(
        "pipelines without a flush, which keep earlier weights",
        without_flush,
        "take another --pp-schedule",
    ),
    Unsupported(
        "ends whenever a signal or a clock says so, for the weights are one at a sync only",
        lambda args: bool(read(args, "exit_signal_handler", False)) or read(args, "exit_duration_in_mins") is not None,
        "leave --exit-signal-handler and --exit-duration-in-mins out",
    ),
    Unsupported(
        "steps that are skipped, after which islands would meet at different ones",
        lambda args: bool(read(args, "iterations_to_skip")),
        "leave --iterations-to-skip out",
    ),
    Unsupported(
        "a number of samples to train on, whose steps are not known beforehand",
        lambda args: read(args, "train_samples") is not None,
        "pass --train-iters in the place of --train-samples",
    ),
    Unsupported(
        "the norm of the weights, which is added up over all islands",
        lambda args: bool(read(args, "log_params_norm", False)),
        "leave --log-params-norm out",
    ),
)
UNSAVED = (
    Unsupported(
        "checkpoints of other formats than torch_dist, which would not hold what it keeps",
        lambda args: read(args, "ckpt_format", "torch_dist") != "torch_dist",
        "pass --ckpt-format torch_dist",
    ),
    Unsupported(
        "checkpoints in the order of the model, which would not hold what it keeps",
        lambda args: bool(read(args, "dist_ckpt_optim_fully_reshardable", False)),
        "leave --dist-ckpt-optim-fully-reshardable out: other CP and DP load the checkpoint all the same",
    ),
    Unsupported(
        "checkpoints on the nodes' own disks, which would not hold what it keeps",
        lambda args: read(args, "non_persistent_ckpt_type") == "local",
        "leave --non-persistent-ckpt-type local out",
    ),
)
"""Checkpoints without what shards have beside Adam's moments: a momentum, or what quantised gradients leave over."""


def check_local_sgd(args: Any) -> None:
    """Refuse what --local-sgd-steps cannot do; ValueError with the rule, the value and a way out."""
    flags = LocalSgdFlags.of(args)
    if flags.steps is None:
        _refuse_alone(flags)
        return
    who, phases = f"--local-sgd-steps {flags.steps}", phases_of(flags.steps)
    refuse(UNSUPPORTED, args, who)
    if flags.spread is not None and flags.spread <= 0:
        raise Refused(f"--local-sgd-spread is more than 0, got {flags.spread}; leave it out to average at every sync")
    _check_outer(args, flags)
    _check_islands(args, who)
    _check_syncs(args, who, phases)


def complete_local_sgd(args: Any) -> None:
    """Let no step meet all ranks that need not, and say which still do."""
    if LocalSgdFlags.of(args).steps is None:
        return
    if read(args, "rerun_mode", "disabled") != "disabled":
        args.rerun_mode = "disabled"
        say("a run that may repeat a step would ask all islands in every step: --rerun-mode disabled")
    if read(args, "log_interval"):
        say(f"--log-interval {args.log_interval}: islands wait for each other at every line of the log too")


def _refuse_alone(flags: LocalSgdFlags) -> None:
    for name, default in vars(LocalSgdFlags()).items():
        if (value := getattr(flags, name)) != default:
            flag = f"--local-sgd-{name.replace('_', '-')}"
            raise Refused(f"{flag} {value} is of islands; pass --local-sgd-steps too, or leave it out")


def _check_outer(args: Any, flags: LocalSgdFlags) -> None:
    entry = flags.outer_optimizer
    if not entry.remembers:
        if flags.outer_lr is not None or flags.outer_momentum is not None:
            raise Refused(
                f"--local-sgd-outer {entry.name} takes the mean, without --local-sgd-outer-lr and "
                f"--local-sgd-outer-momentum; leave them out, or pass --local-sgd-outer nesterov"
            )
        return
    if flags.learning_rate <= 0:
        raise Refused(f"--local-sgd-outer-lr is more than 0, got {flags.learning_rate}; DiLoCo takes 0.7")
    if not 0 <= flags.decay < 1:
        raise Refused(f"--local-sgd-outer-momentum is at least 0 and less than 1, got {flags.decay}; DiLoCo takes 0.9")
    if read(args, "save") is not None:
        refuse(UNSAVED, args, f"--local-sgd-outer {entry.name} with --save")


def _check_islands(args: Any, who: str) -> None:
    count = read(args, "num_distributed_optimizer_instances", 1)
    if not read(args, "use_distributed_optimizer", False) or count < 2:
        raise Refused(
            f"{who} needs islands, the instances of the distributed optimizer: pass --use-distributed-optimizer and "
            f"--num-distributed-optimizer-instances of 2 or more, got {count}"
        )
    if args.data_parallel_size % count:
        raise Refused(
            f"{who}: ranks of a context-parallel group stay together, and --num-distributed-optimizer-instances "
            f"{count} must divide the data-parallel size {args.data_parallel_size}; take a divisor of it"
        )


def _check_syncs(args: Any, who: str, phases: tuple[Phase, ...]) -> None:
    last = read(args, "train_iters") or 0
    if last and not syncs(phases, last):
        raise Refused(
            f"{who}: islands would end apart, for --train-iters {last} is no sync; "
            f"{_nearest(phases, last, 'train_iters')}"
        )
    for name, every in reading(args).items():
        for step in range(every, last + 1, every):
            if not syncs(phases, step):
                raise Refused(
                    f"{who}: weights are one at a sync only, and --{name.replace('_', '-')} {every} reads them at step "
                    f"{step}; {_nearest(phases, step, name)}"
                )


def _nearest(phases: tuple[Phase, ...], step: int, name: str) -> str:
    later = next(
        after for after in range(step, step + max(phase.every for phase in phases) + 1) if syncs(phases, after)
    )
    if name == "train_iters":
        return f"train for {later} steps, or choose other ones"
    return f"the next sync is at {later}; choose a multiple of the steps between syncs"
