"""Unsupported options, each with the alternative to use."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from megatron_cp.errors import Refused


class Unsupported(NamedTuple):
    """An unsupported option; `asked` is True for arguments, or a config, that ask for it."""

    what: str
    asked: Callable[[Any], bool]
    way_out: str


def read(source: Any, name: str, default: Any = None) -> Any:
    """Return an attribute of arguments or of a config, or the default where it is missing."""
    return getattr(source, name, default)


def refuse(features: Iterable[Unsupported], source: Any, who: str) -> None:
    """Raise ValueError, `who` being its subject, for the first of the features that `source` asks for."""
    for feature in features:
        if feature.asked(source):
            raise Refused(f"{who} does not do {feature.what}; {feature.way_out}")


def captures_graphs(args: Any) -> bool:
    """True if CUDA graphs are asked for."""
    # older names, which Megatron turns into that one later
    older = any(read(args, name, False) for name in ("enable_cuda_graph", "external_cuda_graph"))
    return older or read(args, "cuda_graph_impl", "none") != "none"


INSTEAD_OF_HYBRID = (
    "leave --hybrid-context-parallel out; megatron_cp.pretrain_gpt divides the ranks anew for every microbatch with "
    "--cp-plan balanced --context-parallel-size 1 --calculate-per-token-loss, and --cp-tokens-per-rank in the place of "
    "--max-seqlen-per-dp-cp-rank"
)


def shares_weights_out(args: Any) -> bool:
    """True if data-parallel ranks hold parts of the weights."""
    sharded = any(read(args, name, False) for name in ("use_megatron_fsdp", "use_torch_fsdp2"))
    return sharded or read(args, "gtp_weight_remat_size", 1) > 1


PARTS_OF_SEQUENCES = (
    Unsupported(
        "positions other than rotary, learned and none",
        lambda args: (
            read(args, "position_embedding_type", "learned_absolute") not in ("rope", "learned_absolute", "none")
            or bool(read(args, "multi_latent_attention", False))
        ),
        "pass --position-embedding-type rope, without --multi-latent-attention and --cp-latent",
    ),
    Unsupported(
        "layers other than attention that look back, such as Mamba's",
        lambda args: bool(read(args, "hybrid_layer_pattern") or read(args, "experimental_attention_variant")),
        "take a model of attention layers alone",
    ),
)
"""Options of models whose layers do not know where a part of a sequence stands."""

WEIGHTS_SHARED_OUT = Unsupported(
    "weights that data-parallel ranks share out",
    shares_weights_out,
    "use --use-distributed-optimizer",
)
OFFLOADED_EXPERTS = Unsupported(
    "the offload of experts' activations",
    lambda args: bool({"expert_fc1", "moe_act"} & set(read(args, "offload_modules") or ())),
    "leave expert_fc1 and moe_act out of --offload-modules",
)
OTHER_THAN_ADAM = Unsupported(
    "another optimizer than Adam",
    lambda args: read(args, "optimizer", "adam") != "adam",
    "pass --optimizer adam",
)
OTHER_UPDATES = (
    Unsupported(
        "optimizers that keep the weights themselves",
        lambda args: any(
            read(args, name, False)
            for name in (
                "use_precision_aware_optimizer",
                "optimizer_cpu_offload",
                "fp8_param_gather",
                "fp4_param_gather",
            )
        ),
        "leave --use-precision-aware-optimizer, --optimizer-cpu-offload, --fp8-param-gather and --fp4-param-gather out",
    ),
    Unsupported(
        "updates that a CUDA graph holds",
        lambda args: bool(read(args, "optimizer_cuda_graph", False)),
        "leave --optimizer-cuda-graph out",
    ),
    Unsupported(
        "gathers beside the update",
        lambda args: bool(read(args, "overlap_param_gather_with_optimizer_step", False)),
        "leave --overlap-param-gather-with-optimizer-step out",
    ),
)
"""Options of optimizers whose update, or whose weights, are not where the distributed optimizer has them."""
