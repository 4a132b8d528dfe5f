"""Checks of `--overlap-moe-expert-parallel-comm` under a schedule of ours."""

from typing import Any

from megatron_cp.errors import Refused
from megatron_cp.megatron.arguments.unsupported import Unsupported, read, refuse
from megatron_cp.megatron.flags.pipeline import PipelineFlags
from megatron_cp.pipeline import SCHEDULES

FLAG = "--overlap-moe-expert-parallel-comm"


def _recomputes_experts(args: Any) -> bool:
    """True if a backward runs the forward of a whole layer, or of its experts, again."""
    whole = any(read(args, name) is not None for name in ("recompute_method", "recompute_num_layers"))
    experts = "moe" in (read(args, "recompute_modules") or ()) or bool(read(args, "moe_layer_recompute", False))
    return whole or experts or read(args, "recompute_granularity") == "full"


COMBINED_UNSUPPORTED = (
    Unsupported(
        "experts that lie on one rank, which send nothing",
        lambda args: not read(args, "num_experts") or read(args, "expert_model_parallel_size", 1) < 2,
        "pass --num-experts and an --expert-model-parallel-size of at least 2, or leave the flag out",
    ),
    Unsupported(
        "a dispatcher that gathers tokens",
        lambda args: read(args, "moe_token_dispatcher_type", "allgather") not in ("alltoall", "flex"),
        "pass --moe-token-dispatcher-type alltoall",
    ),
    Unsupported(
        "float32, which Megatron's plans of a layer do not take",
        lambda args: not (read(args, "bf16", False) or read(args, "fp16", False)),
        "pass --bf16",
    ),
    Unsupported(
        "recompute of whole layers or of experts, whose messages would be sent again inside a backward",
        _recomputes_experts,
        "pass --recompute-granularity selective, with other modules than moe",
    ),
    Unsupported(
        "the overlap of shared experts, which run beside the same messages",
        lambda args: bool(read(args, "moe_shared_expert_overlap", False)),
        "leave --moe-shared-expert-overlap out",
    ),
    Unsupported(
        "a hybrid pattern of layers, whose model makes no plan",
        lambda args: bool(read(args, "hybrid_layer_pattern")),
        "leave --hybrid-layer-pattern out",
    ),
    Unsupported(
        "activations that move, which are recorded while a forward runs alone",
        lambda args: PipelineFlags.of(args).moves_activations,
        "leave --pp-offload out",
    ),
    Unsupported(
        "an LM head over all ranks, for the plan of the last stage ends with its loss",
        lambda args: PipelineFlags.of(args).vocab_parallel is not None,
        "leave --pp-vocab-parallel out",
    ),
)


def check_combined(args: Any, schedule: str) -> None:
    """Refuse overlapped messages between experts where a schedule, or Megatron's plan of a layer, has none; one line.

    Megatron checks some of it too, but after the layers' own arguments and by bare assertions, and under two copies of
    the model its check does not run.
    """
    if not read(args, "overlap_moe_expert_parallel_comm", False):
        return
    rule = SCHEDULES.get(schedule)
    if not rule.overlaps:
        known = " or ".join(other.name for other in SCHEDULES if other.overlaps)
        raise Refused(
            f"--pp-schedule {schedule} does not do overlap of expert-parallel communication, for no forward in its "
            f"table is meant to run beside a backward; leave {FLAG} out, or take {known}"
        )
    refuse(COMBINED_UNSUPPORTED, args, FLAG)
