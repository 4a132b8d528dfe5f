"""Checks of the flags for copies of busy experts, before the model is built."""

from typing import Any

from megatron_cp.errors import Refused
from megatron_cp.experts import PLACEMENTS
from megatron_cp.megatron.arguments.unsupported import OFFLOADED_EXPERTS, WEIGHTS_SHARED_OUT, Unsupported, read, refuse
from megatron_cp.megatron.flags.experts import ExpertFlags

TRAVELLING = (
    Unsupported(
        "transformer-engine's experts, which keep weights of their own",
        lambda args: read(args, "transformer_impl", "local") != "local",
        "pass --transformer-impl local",
    ),
    Unsupported(
        "gradients that a fused product adds up, where those that come home are not counted",
        lambda args: bool(read(args, "gradient_accumulation_fusion", False)),
        "pass --no-gradient-accumulation-fusion",
    ),
    Unsupported(
        "products in FP8 or FP4, and tokens padded for them",
        lambda args: any(read(args, name) for name in ("fp8", "fp4", "moe_router_padding_for_quantization")),
        "leave --fp8-format, --fp4-format and --moe-router-padding-for-quantization out",
    ),
    Unsupported(
        "Megatron's own delay of weight gradients, which knows no weights of other ranks",
        lambda args: bool(read(args, "delay_wgrad_compute", False)),
        "leave --delay-wgrad-compute out",
    ),
    WEIGHTS_SHARED_OUT,
    OFFLOADED_EXPERTS,
)
"""Options that weights of experts on other ranks than their own do not serve."""

UNPLACED = (
    *TRAVELLING,
    Unsupported(
        "inputs padded to a capacity, which empty slots would have too",
        lambda args: bool(read(args, "moe_pad_expert_input_to_capacity", False)),
        "leave --moe-pad-expert-input-to-capacity out",
    ),
    Unsupported(
        "experts that tensor-parallel ranks share",
        lambda args: (read(args, "expert_tensor_parallel_size") or read(args, "tensor_model_parallel_size", 1)) > 1,
        "pass --expert-tensor-parallel-size 1",
    ),
)
"""Options that copies of experts do not serve."""


def check_placement(args: Any) -> None:
    """Refuse what copies of experts cannot do; ValueError with the rule and a way out."""
    flags = ExpertFlags.of(args)
    if not flags.places:
        if flags.replica_slots is not None:
            raise Refused(
                f"--moe-replica-slots {flags.replica_slots} is of copies of experts; add --moe-placement "
                f"{' or '.join(PLACEMENTS.names)}, or leave it out"
            )
        if flags.copies_ahead != 1:
            raise Refused(
                f"--moe-copies-ahead {flags.copies_ahead} is of copies of experts; add --moe-placement "
                f"{' or '.join(PLACEMENTS.names)}, or leave it out"
            )
        return
    if flags.copies_ahead not in (0, 1):
        raise Refused(f"--moe-copies-ahead must be 0 or 1 layers, got {flags.copies_ahead}; leave it out for 1")
    if flags.slots < 1:
        raise Refused(f"--moe-replica-slots must be at least 1, got {flags.slots}; leave --moe-placement out for none")
    if flags.placement_interval < 1:
        raise Refused(f"--moe-placement-interval must be at least 1 step, got {flags.placement_interval}")
    refuse(UNPLACED, args, f"--moe-placement {PLACEMENTS.get(flags.placement).name}")
