"""Check and settle what a layer of experts chooses in each step: pieces, hops, and what is gathered."""

import math
from collections.abc import Callable
from typing import Any

from megatron_cp.errors import Refused
from megatron_cp.experts import AUTO, TOKENS, TUTEL, WEIGHTS
from megatron_cp.experts.degree import DEGREES, MixtureSize, weigh
from megatron_cp.experts.dispatch_cost import STOCK, ExpertRanks
from megatron_cp.hardware.cluster import Cluster
from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.megatron.arguments.experts import UNCUT, tensor_ranks
from megatron_cp.megatron.arguments.placement import TRAVELLING
from megatron_cp.megatron.arguments.unsupported import Unsupported, read, refuse
from megatron_cp.megatron.flags.experts import COSTS, STEPS, TUNINGS, ExpertFlags
from megatron_cp.megatron.flags.pipeline import PipelineFlags
from megatron_cp.megatron.run import say

UNGATHERED = (
    *TRAVELLING,
    Unsupported(
        "copies of experts, which are whole",
        lambda args: ExpertFlags.of(args).places,
        "leave --moe-placement out, or pass --moe-gather tokens",
    ),
    Unsupported(
        "steps without a flush, whose microbatches have several versions of the weights",
        lambda args: PipelineFlags.of(args).without_flush,
        "pass --moe-gather tokens, or a --pp-schedule that flushes, such as 1f1b",
    ),
)
"""Options that weights gathered from the ranks that share them do not serve."""


def check_degrees(args: Any) -> None:
    """Refuse numbers of pieces to choose from without a choice; ValueError with the rule and a way out."""
    flags = ExpertFlags.of(args)
    if flags.degrees is None:
        return
    who = f"--moe-degrees {flags.degrees}"
    if flags.exchange.name != TUTEL or flags.pieces > 1:
        raise Refused(f"{who} is of pieces that are chosen; pass --moe-comm-type {TUTEL} without --moe-pieces")
    if max(flags.degree_list) > 1:
        refuse(UNCUT, args, who)


def settle_exchange(args: Any, default: Callable[[], Cluster]) -> None:
    """Replace `tutel` of --moe-comm-type by the pieces and hops that take least, and say why; it refuses nothing.

    What is chosen for a step's tokens later is left in --moe-degrees and --moe-gather.
    default: the cluster where --moe-cluster names none
    """
    flags = ExpertFlags.of(args)
    if flags.exchange.name != TUTEL or not read(args, "num_experts"):
        return
    if read(args, "hidden_size") is None or read(args, "seq_length") is None:
        # Megatron asks for them
        return
    whole = any(each.asked(args) for each in UNCUT)
    degrees = flags.degree_list or ((flags.pieces,) if flags.pieces > 1 else DEGREES[:1] if whole else DEGREES)
    ranks = ExpertRanks(read(args, "expert_model_parallel_size", 1), tensor_ranks(args))
    if flags.gather is None:
        kept = ranks.tensor == 1 or flags.places or any(each.asked(args) for each in UNGATHERED)
        args.moe_gather = TOKENS if kept else AUTO
    gathers = (TOKENS, WEIGHTS) if args.moe_gather == AUTO else (args.moe_gather,)
    try:
        cluster = default() if flags.cluster is None else load_cluster(flags.cluster)
        found = weigh(_mixture(args), ranks, cluster, degrees, flags.ranks_per_node, gathers)
        taken, why = found[0].dispatch, ", ".join(map(str, found))
    except Refused as refused:
        taken, why = STOCK._replace(pieces=degrees[0]), str(refused)
    args.moe_comm_type, args.moe_pieces = taken.comm_type, taken.pieces
    again = len(degrees) > 1 and ranks.sharing > 1 and not flags.places
    args.moe_degrees = ",".join(map(str, degrees)) if again else None
    if flags.tuning == STEPS and not again and args.moe_gather != AUTO:
        args.moe_tuning = COSTS
        say(f"--moe-tuning {STEPS}: there is one choice, and nothing to measure")
    if not (again or taken.two_hops):
        args.moe_ranks_per_node = None
    say(f"--moe-comm-type {taken.comm_type} --moe-pieces {taken.pieces}: {why}")


def _mixture(args: Any) -> MixtureSize:
    tokens = read(args, "seq_length") * read(args, "micro_batch_size", 1)
    tokens /= read(args, "context_parallel_size", 1) * read(args, "tensor_model_parallel_size", 1)
    return MixtureSize(
        tokens,
        read(args, "moe_router_topk", 2),
        read(args, "num_experts"),
        read(args, "hidden_size"),
        read(args, "moe_ffn_hidden_size") or read(args, "ffn_hidden_size") or 4 * read(args, "hidden_size"),
        3 if read(args, "swiglu", False) else 2,
        "bfloat16" if read(args, "bf16", False) else "float16" if read(args, "fp16", False) else "float32",
        PipelineFlags.of(args).splits,
        _microbatches(args),
    )


def _microbatches(args: Any) -> float:
    """Return the microbatches of a step that a rank has."""
    copies = math.prod(read(args, f"{name}_parallel_size", 1) for name in ("context", "tensor_model", "pipeline_model"))
    ranks = max(1, (read(args, "world_size") or 1) // copies)
    return max(1.0, (read(args, "global_batch_size") or 1) / (read(args, "micro_batch_size", 1) * ranks))


def check_tuning(args: Any) -> None:
    """Refuse choices of a step that layers cannot make; ValueError with the rule and a way out."""
    flags = ExpertFlags.of(args)
    if flags.gather not in (None, TOKENS, WEIGHTS, AUTO):
        raise Refused(f"--moe-gather must be {TOKENS}, {WEIGHTS} or {AUTO}, got {flags.gather}")
    if flags.tuning not in TUNINGS:
        raise Refused(f"--moe-tuning must be {' or '.join(TUNINGS)}, got {flags.tuning}")
    if flags.tuning != COSTS and flags.degrees is None and flags.gather != AUTO:
        raise Refused(
            f"--moe-tuning {flags.tuning} is of choices for a step's tokens; add --moe-comm-type {TUTEL} or "
            f"--moe-gather {AUTO}, or leave it out"
        )
    if flags.gathers:
        _check_gather(args, flags.gather)


def _check_gather(args: Any, gather: str | None) -> None:
    who = f"--moe-gather {gather}"
    if tensor_ranks(args) == 1:
        raise Refused(
            f"{who} is of experts that several ranks share; add --expert-tensor-parallel-size, or leave it out"
        )
    refuse(UNGATHERED, args, who)
