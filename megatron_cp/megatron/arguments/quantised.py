"""Checks of the flags for quantised messages between replicas, once Megatron has worked out its sizes."""

from typing import Any

from megatron_cp.errors import Refused
from megatron_cp.megatron.arguments.replicas import UNSAVED, without_flush
from megatron_cp.megatron.arguments.unsupported import Unsupported, read, refuse, shares_weights_out
from megatron_cp.megatron.flags.pipeline import PipelineFlags
from megatron_cp.megatron.flags.replicas import LocalSgdFlags, QuantisedFlags
from megatron_cp.megatron.run import say

GRADIENTS = "--zero-quantized-gradients"
WEIGHTS = "--zero-quantized-weights"
OF_BOTH = (
    Unsupported(
        "weights that data-parallel ranks share out, which have collectives of their own",
        shares_weights_out,
        "use --use-distributed-optimizer in their place",
    ),
    Unsupported(
        "replicas without the distributed optimizer, which send gradients another way",
        lambda args: not read(args, "use_distributed_optimizer", False),
        "pass --use-distributed-optimizer",
    ),
    Unsupported("Local SGD", lambda args: LocalSgdFlags.of(args).steps is not None, "leave --local-sgd-steps out"),
    Unsupported(
        "several instances of the distributed optimizer",
        lambda args: read(args, "num_distributed_optimizer_instances", 1) > 1,
        "leave --num-distributed-optimizer-instances out: nodes are found without",
    ),
    Unsupported(
        "loss scales, which hang on what overflows",
        lambda args: bool(read(args, "fp16", False)),
        "pass --bf16 in the place of --fp16",
    ),
    Unsupported(
        "weights of 8 or 4 bits",
        lambda args: any(read(args, name, False) for name in ("fp8_param_gather", "fp4_param_gather")),
        "leave --fp8-param-gather and --fp4-param-gather out",
    ),
    Unsupported(
        "optimizers that share out whole layers",
        lambda args: read(args, "optimizer", "adam") not in ("adam", "sgd"),
        "pass --optimizer adam",
    ),
    Unsupported(
        "pipelines without a flush, which keep earlier weights",
        without_flush,
        "take another --pp-schedule",
    ),
    Unsupported(
        "pipelines of two copies, which would be rounded apart",
        lambda args: PipelineFlags.of(args).two_copies,
        "take another --pp-schedule",
    ),
)
OF_GRADIENTS = (
    Unsupported(
        "means that the collective takes",
        lambda args: bool(read(args, "ddp_average_in_collective", False)),
        "leave --ddp-average-in-collective out",
    ),
)
OF_WEIGHTS = (
    Unsupported(
        "float32 weights, which the optimizer has no others beside",
        lambda args: not read(args, "bf16", False),
        f"pass --bf16, or leave {WEIGHTS} out",
    ),
    Unsupported(
        "optimizers that keep half of a weight in the model, or on the host",
        lambda args: any(
            read(args, name, False) for name in ("use_precision_aware_optimizer", "optimizer_cpu_offload")
        ),
        "leave --use-precision-aware-optimizer and --optimizer-cpu-offload out",
    ),
    Unsupported(
        "gathers beside the update",
        lambda args: bool(read(args, "overlap_param_gather_with_optimizer_step", False)),
        "leave --overlap-param-gather-with-optimizer-step out",
    ),
)


def check_quantised(args: Any) -> None:
    """Refuse what quantised messages cannot do; ValueError with the rule, the value and a way out."""
    flags = QuantisedFlags.of(args)
    if not flags.asked:
        if flags.ranks_per_node is not None:
            raise Refused(
                f"--zero-quantized-ranks-per-node {flags.ranks_per_node} is of quantised messages; pass {GRADIENTS} or "
                f"{WEIGHTS} too, or leave it out"
            )
        return
    who = WEIGHTS if flags.of_gradients is None else f"{GRADIENTS} {flags.gradients}"
    refuse(OF_BOTH, args, who)
    if flags.of_gradients is not None:
        refuse(OF_GRADIENTS, args, who)
        if flags.of_gradients.keeps and read(args, "save") is not None:
            refuse(UNSAVED, args, f"{who} with --save")
    if flags.weights:
        refuse(OF_WEIGHTS, args, WEIGHTS)
    if flags.ranks_per_node is not None and flags.ranks_per_node < 1:
        raise Refused(
            f"--zero-quantized-ranks-per-node is 1 or more, got {flags.ranks_per_node}; leave it out, and torchrun's "
            "own number counts"
        )
    ranks = read(args, "data_parallel_size", 1) * read(args, "context_parallel_size", 1)
    if ranks == 1:
        raise Refused(
            f"{who} has nothing to send: data-parallel and context-parallel size are 1; leave it out, or run on more "
            "ranks"
        )


def complete_quantised(args: Any) -> None:
    """Choose the reduce-scatter of Megatron's that ours takes the place of."""
    if QuantisedFlags.of(args).gradients is None or read(args, "ddp_reduce_scatter_with_fp32_accumulation", False):
        return
    args.ddp_reduce_scatter_with_fp32_accumulation = True
    say(f"{GRADIENTS}: --ddp-reduce-scatter-with-fp32-accumulation")
