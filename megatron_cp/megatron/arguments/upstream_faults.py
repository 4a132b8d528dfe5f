"""Refuse what megatron-core 0.19 computes wrongly or ends in a traceback without a word, until it is mended.

docs/limits.md lists each fault with its reproduction and the figures seen.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from megatron_cp.errors import Refused
from megatron_cp.megatron.arguments.unsupported import read
from megatron_cp.megatron.run import has_our_layers


class Fault(NamedTuple):
    """A fault of Megatron's own; `met` is True for arguments that run into it."""

    met: Callable[[Any], bool]
    text: str


def _instances(args: Any) -> bool:
    return bool(read(args, "use_megatron_fsdp", False)) and read(args, "num_distributed_optimizer_instances", 1) > 1


def _plans(args: Any) -> bool:
    return bool(read(args, "overlap_moe_expert_parallel_comm", False))


def _ends_dense(args: Any) -> bool:
    """True if the last layer has no experts."""
    frequency, layers = read(args, "moe_layer_freq", 1), read(args, "num_layers")
    if isinstance(frequency, int):
        return bool(layers) and frequency > 1 and (layers - 1) % frequency != 0
    return bool(frequency) and not frequency[-1]


FAULTS = (
    Fault(
        lambda args: read(args, "save", None) is not None and read(args, "save_interval", 1) is None,
        "--save {save} says where checkpoints go and not when; add --save-interval",
    ),
    Fault(
        lambda args: bool(read(args, "use_megatron_fsdp", False)) and read(args, "pipeline_model_parallel_size", 1) > 1,
        "--use-megatron-fsdp takes the ranks of all stages for its own, got --pipeline-model-parallel-size "
        "{pipeline_model_parallel_size}; use --use-distributed-optimizer with --grad-reduce-in-bf16, or one stage",
    ),
    Fault(
        lambda args: (
            bool(read(args, "use_torch_fsdp2", False))
            and (
                (read(args, "save", None) is not None and not read(args, "no_save_optim", False))
                or (read(args, "load", None) is not None and not read(args, "no_load_optim", False))
            )
        ),
        "--use-torch-fsdp2 loses the optimizer on its way into a checkpoint or out of it; add --no-save-optim and "
        "--no-load-optim, or use --use-megatron-fsdp",
    ),
    Fault(
        lambda args: _instances(args) and not read(args, "overlap_grad_reduce", False),
        "--use-megatron-fsdp with --num-distributed-optimizer-instances {num_distributed_optimizer_instances} reduces "
        "no gradients between the instances without --overlap-grad-reduce, and they drift apart; add it",
    ),
    Fault(
        lambda args: (
            _instances(args)
            and read(args, "outer_dp_sharding_strategy", "no_shard") != "no_shard"
            and read(args, "clip_grad", 0.0) > 0
        ),
        "--outer-dp-sharding-strategy {outer_dp_sharding_strategy} makes the gradient norm too large, by which "
        "--clip-grad {clip_grad} scales every gradient; pass --clip-grad 0, or leave the strategy out",
    ),
    Fault(
        lambda args: (
            bool(read(args, "reset_attention_mask", False))
            and not read(args, "create_attention_mask_in_dataloader", True)
            and not has_our_layers(args)
        ),
        "--reset-attention-mask hides nothing in stock layers without a mask tensor; leave "
        "--no-create-attention-mask-in-dataloader out, or name a layer spec of megatron-cp",
    ),
    Fault(
        lambda args: (
            bool(read(args, "dataloader_inter_document_masking", False))
            and read(args, "context_parallel_size", 1) > 1
            and not has_our_layers(args)
        ),
        "--dataloader-inter-document-masking with --context-parallel-size {context_parallel_size} gives tokens the "
        "positions of others in stock layers; leave one of the two out, or name a layer spec of megatron-cp",
    ),
    Fault(
        lambda args: _plans(args) and _ends_dense(args),
        "--overlap-moe-expert-parallel-comm leaves out the norm behind a last layer without experts, got "
        "--moe-layer-freq {moe_layer_freq} for {num_layers} layers; let the last one have experts, or leave the flag "
        "out",
    ),
    Fault(
        lambda args: (
            _plans(args)
            and bool(read(args, "sequence_parallel", False))
            and read(args, "tensor_model_parallel_size", 1) > 1
            and any(read(args, name, 0.0) for name in ("hidden_dropout", "attention_dropout"))
        ),
        "--overlap-moe-expert-parallel-comm with --sequence-parallel drops the same elements on all tensor-parallel "
        "ranks, got --hidden-dropout {hidden_dropout} and --attention-dropout {attention_dropout}; pass 0 for both, or "
        "leave one of the two flags out",
    ),
)

WITHOUT_TE = (
    Fault(
        lambda args: (
            (read(args, "recompute_granularity") == "selective" or bool(read(args, "recompute_activations", False)))
            and "layernorm" in (read(args, "recompute_modules") or ())
        ),
        "layernorm of --recompute-modules asks transformer-engine for its state of FP8 with and without FP8, and ends "
        "in a NameError where it is not installed; leave layernorm out, or install it",
    ),
)
"""Faults on a machine without transformer-engine."""


def refuse_upstream_faults(args: Any, te: bool) -> None:
    """Raise ValueError for the first fault of Megatron's own that these arguments run into.

    te: transformer-engine is installed where the run is meant for
    """
    for fault in FAULTS if te else (*FAULTS, *WITHOUT_TE):
        if fault.met(args):
            raise Refused(f"megatron-core 0.19: {fault.text.format(**vars(args))}")
