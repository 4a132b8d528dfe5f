"""Checks of the flags for the optimizer's state in files, once Megatron has worked out its sizes."""

import os
from typing import Any

from megatron_cp.errors import Refused
from megatron_cp.megatron.arguments.unsupported import (
    OTHER_THAN_ADAM,
    OTHER_UPDATES,
    Unsupported,
    read,
    refuse,
    shares_weights_out,
)
from megatron_cp.megatron.flags.replicas import LocalSgdFlags, StateFlags

UNSUPPORTED = (
    Unsupported(
        "weights that data-parallel ranks share out, which have an optimizer of their own",
        shares_weights_out,
        "use --use-distributed-optimizer in their place",
    ),
    Unsupported(
        "optimizers that are not sharded",
        lambda args: not read(args, "use_distributed_optimizer", False),
        "pass --use-distributed-optimizer",
    ),
    OTHER_THAN_ADAM,
    *OTHER_UPDATES,
    Unsupported(
        "Local SGD, whose islands average moments on their devices",
        lambda args: LocalSgdFlags.of(args).steps is not None,
        "leave --local-sgd-steps out",
    ),
    Unsupported(
        "saves beside the next steps, which change what is being saved",
        lambda args: bool(read(args, "async_save", False)),
        "leave --async-save out",
    ),
)
OF_WEIGHTS = (
    Unsupported(
        "a float32 model, whose optimizer has no weights beside the model's",
        lambda args: not read(args, "bf16", False) and not read(args, "fp16", False),
        "pass --bf16, or leave --optimizer-state-weights out",
    ),
    Unsupported(
        "the norm of the weights, which is taken on the device",
        lambda args: bool(read(args, "log_params_norm", False)),
        "leave --log-params-norm out",
    ),
)


def check_on_disk(args: Any) -> None:
    """Refuse what --optimizer-state-dir cannot do; ValueError with the rule, the value and a way out."""
    flags = StateFlags.of(args)
    if flags.dir is None:
        if flags.weights:
            raise Refused(
                "--optimizer-state-weights is of a state in files; pass --optimizer-state-dir DIR too, or leave it out"
            )
        return
    refuse(UNSUPPORTED, args, f"--optimizer-state-dir {flags.dir}")
    if flags.weights:
        refuse(OF_WEIGHTS, args, "--optimizer-state-weights")


def check_state_dir(args: Any) -> None:
    """Refuse a directory in which this process can make no files; ValueError with a way out."""
    directory = StateFlags.of(args).dir
    if directory is None:
        return
    if not os.path.isdir(directory):
        raise Refused(f"--optimizer-state-dir {directory} is no directory; make it on every node, or give another one")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise Refused(f"--optimizer-state-dir {directory} cannot be written to; give a directory that can")
