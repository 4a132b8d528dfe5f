"""Checks of the flags for experts, before the model is built."""

import math
from typing import Any

from megatron_cp import config
from megatron_cp.errors import Refused
from megatron_cp.experts import (
    AUTO,
    EXCHANGES,
    LOOP,
    MEGATRONS,
    PLACEMENTS,
    PRODUCTS,
    ROUTERS,
    TUTEL,
    ExpertRouter,
)
from megatron_cp.experts.degree import check_pieces
from megatron_cp.experts.grouped_mm import ROW_BYTES
from megatron_cp.experts.nodes import ranks_on_nodes
from megatron_cp.experts.pyramid import FLAG, experts_of_layers
from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.megatron.arguments.unsupported import (
    OFFLOADED_EXPERTS,
    WEIGHTS_SHARED_OUT,
    Unsupported,
    captures_graphs,
    read,
    refuse,
)
from megatron_cp.megatron.flags.experts import ExpertFlags
from megatron_cp.megatron.flags.pipeline import PipelineFlags
from megatron_cp.megatron.run import has_our_layers, say

GRAPHS = Unsupported(
    "CUDA graphs, which know no number of tokens",
    captures_graphs,
    "leave --cuda-graph-impl and --enable-cuda-graph out",
)

UNSUPPORTED = (
    Unsupported(
        "products in FP8 or FP4, which transformer-engine's experts compute",
        lambda args: any(read(args, name) for name in ("fp8", "fp4")),
        "leave --fp8-format and --fp4-format out",
    ),
    Unsupported(
        "transformer-engine's activation functions",
        lambda args: bool(read(args, "use_te_activation_func", False)),
        "leave --use-te-activation-func out",
    ),
    Unsupported(
        "Megatron's own delay of weight gradients",
        lambda args: any(
            read(args, name, False) for name in ("delay_wgrad_compute", "overlap_dispatch_backward_with_experts_wgrad")
        ),
        "leave --delay-wgrad-compute and --overlap-dispatch-backward-with-experts-wgrad out, a split schedule delays "
        "them itself",
    ),
    WEIGHTS_SHARED_OUT,
    GRAPHS,
    Unsupported(
        "gates and values in interleaved blocks",
        lambda args: read(args, "moe_mlp_glu_interleave_size") is not None,
        "leave --moe-mlp-glu-interleave-size out",
    ),
    Unsupported(
        "the offload of their activations, which transformer-engine's experts do",
        lambda args: bool({"expert_fc1", "moe_act"} & set(read(args, "offload_modules") or ())),
        "leave expert_fc1 and moe_act out of --offload-modules, or recompute with --recompute-modules moe_act",
    ),
    Unsupported(
        "probabilities on the input of several experts per token",
        lambda args: bool(read(args, "moe_apply_probs_on_input", False)) and read(args, "moe_router_topk", 2) != 1,
        "pass --moe-router-topk 1 or leave --moe-apply-probs-on-input out",
    ),
)

UNEXCHANGED = (
    Unsupported(
        "the overlap of shared experts, which run beside Megatron's own exchange",
        lambda args: bool(read(args, "moe_shared_expert_overlap", False)),
        "leave --moe-shared-expert-overlap out",
    ),
    Unsupported(
        "messages that overlap other microbatches or weight gradients",
        lambda args: any(
            read(args, name, False)
            for name in ("overlap_moe_expert_parallel_comm", "overlap_dispatch_backward_with_experts_wgrad")
        ),
        "leave --overlap-moe-expert-parallel-comm and --overlap-dispatch-backward-with-experts-wgrad out",
    ),
    GRAPHS,
)
"""Options that an exchange of ours does not serve."""

UNREPEATED = (
    Unsupported(
        "products in FP8 or FP4, whose scales count the calls of a layer",
        lambda args: any(read(args, name) for name in ("fp8", "fp4")),
        "leave --fp8-format and --fp4-format out",
    ),
    Unsupported(
        "Megatron's own delay of weight gradients, which knows one call of a layer",
        lambda args: bool(read(args, "delay_wgrad_compute", False)),
        "leave --delay-wgrad-compute out",
    ),
    Unsupported(
        "split schedules with transformer-engine's experts, which know one call of a layer",
        lambda args: read(args, "transformer_impl", "local") != "local" and PipelineFlags.of(args).splits,
        "pass --transformer-impl local, or a schedule without W",
    ),
    WEIGHTS_SHARED_OUT,
    OFFLOADED_EXPERTS,
)
"""Options that do not serve several calls of a layer's experts."""

UNCUT = (
    Unsupported(
        "inputs padded to a capacity, of which each piece would have another",
        lambda args: bool(read(args, "moe_pad_expert_input_to_capacity", False)),
        "leave --moe-pad-expert-input-to-capacity out",
    ),
    *UNREPEATED,
)
"""Options that pieces do not serve."""

UNHELD = (
    Unsupported(
        "a hybrid pattern of layers, which says nothing once the model is wrapped",
        lambda args: bool(read(args, "hybrid_layer_pattern")),
        "pass --moe-comm-type pipelined",
    ),
)
"""Options with which no reduction of gradients can wait for an exchange."""

UNROUTED = (
    Unsupported(
        "gates other than a softmax",
        lambda args: read(args, "moe_router_score_function", "softmax") != "softmax",
        "pass --moe-router-score-function softmax",
    ),
    Unsupported(
        "balance other than by a loss",
        lambda args: not set(_balances(args)) <= {"none", "aux_loss", "seq_aux_loss", "global_aux_loss"},
        "pass --moe-router-load-balancing-type aux_loss",
    ),
    Unsupported(
        "biases of experts",
        lambda args: bool(read(args, "moe_router_enable_expert_bias", False)),
        "leave --moe-router-enable-expert-bias out",
    ),
    Unsupported(
        "groups of experts",
        lambda args: any(
            read(args, name)
            for name in ("moe_router_num_groups", "moe_router_group_topk", "moe_router_topk_limited_devices")
        ),
        "leave --moe-router-num-groups and --moe-router-group-topk out",
    ),
    Unsupported(
        "scaled gates",
        lambda args: bool(read(args, "moe_router_topk_scaling_factor")),
        "leave --moe-router-topk-scaling-factor out",
    ),
    Unsupported(
        "inputs padded to the capacity, of which no expert is sent more than it gets",
        lambda args: bool(read(args, "moe_pad_expert_input_to_capacity", False)),
        "leave --moe-pad-expert-input-to-capacity out",
    ),
    Unsupported(
        "routers of transformer-engine",
        lambda args: bool(read(args, "moe_router_fusion", False)),
        "leave --moe-router-fusion out",
    ),
    Unsupported(
        "experts that were recorded",
        lambda args: bool(read(args, "moe_enable_routing_replay", False)),
        "leave --moe-enable-routing-replay out",
    ),
    GRAPHS,
)
"""Options that a router of ours does not serve."""

UNMIXED = (
    Unsupported(
        "the overlap of its MLP, which runs beside Megatron's exchange",
        lambda args: bool(read(args, "moe_shared_expert_overlap", False)),
        "leave --moe-shared-expert-overlap out",
    ),
    Unsupported(
        "probabilities on the input, of which a share of the output is no part",
        lambda args: bool(read(args, "moe_apply_probs_on_input", False)),
        "leave --moe-apply-probs-on-input out",
    ),
    Unsupported(
        "its MLP computed again alone, for a gate would get two gradients in a step",
        lambda args: "shared_experts" in (read(args, "recompute_modules") or ()),
        "leave shared_experts out of --recompute-modules, or take moe",
    ),
    WEIGHTS_SHARED_OUT,
)
"""Options that a router beside an MLP does not serve."""

UNLIKE = (
    Unsupported(
        "transformer-engine's layers",
        lambda args: read(args, "transformer_impl", "local") != "local",
        "pass --transformer-impl local",
    ),
    Unsupported(
        "a hybrid pattern of layers",
        lambda args: bool(read(args, "hybrid_layer_pattern")),
        "leave --hybrid-layer-pattern out",
    ),
    Unsupported(
        "biases of experts, which Megatron updates as one tensor of all layers",
        lambda args: (
            bool(read(args, "moe_router_enable_expert_bias", False)) or "quantile_balancing" in _balances(args)
        ),
        "leave --moe-router-enable-expert-bias out, and pass --moe-router-load-balancing-type aux_loss",
    ),
    Unsupported(
        "weights of a dense model",
        lambda args: bool(read(args, "moe_use_upcycling", False)),
        "leave --moe-use-upcycling out",
    ),
    WEIGHTS_SHARED_OUT,
)
"""Options that layers with different numbers of experts do not serve."""


def imply_dispatcher(args: Any) -> None:
    """Take the alltoall dispatcher, whose exchange is ours, instead of Megatron's default."""
    if ExpertFlags.of(args).exchanges and read(args, "moe_token_dispatcher_type") == "allgather":
        args.moe_token_dispatcher_type = "alltoall"
        say(f"{_asked(args)}: --moe-token-dispatcher-type alltoall")


def imply_pieces(args: Any) -> None:
    """Take as many pieces as the exchange that is asked for has, where none are."""
    exchange = ExpertFlags.of(args).exchange
    if exchange.pieces > 1 and read(args, "moe_pieces", 1) == 1:
        args.moe_pieces = exchange.pieces
        say(f"--moe-comm-type {exchange.name}: --moe-pieces {exchange.pieces}")


def check_cluster(args: Any) -> None:
    """Refuse a cluster for experts that none reads, or that there is not; ValueError with the rule and a way out."""
    flags = ExpertFlags.of(args)
    if flags.cluster is None:
        return
    if not flags.places and flags.exchange.name != TUTEL and flags.gather != AUTO:
        raise Refused(
            f"--moe-cluster {flags.cluster} is of copies of experts and of costs of an exchange; add --moe-placement, "
            f"--moe-comm-type {TUTEL} or --moe-gather {AUTO}, or leave it out"
        )
    load_cluster(flags.cluster)


def imply_layers(args: Any) -> None:
    """Name layers with different numbers of experts one by one, so that checkpoints do not stack their weights."""
    frequency, layers = read(args, "moe_layer_freq", 1), read(args, "num_layers")
    if ExpertFlags.of(args).layer_experts is not None and layers and isinstance(frequency, int):
        args.moe_layer_freq = [int(index % frequency == 0) for index in range(layers)]
        say(f"{FLAG}: --moe-layer-freq names each of {layers} layers")


def check_layers(args: Any) -> None:
    """Refuse layers with different numbers of experts where they cannot be; ValueError with the rule and a way out."""
    asked, experts, layers = ExpertFlags.of(args).layer_experts, read(args, "num_experts"), read(args, "num_layers")
    if asked is None:
        return
    if not experts or not layers:
        raise Refused(f"{FLAG} {asked} is of layers of experts; add --num-experts and --num-layers, or leave it out")
    if not has_our_layers(args):
        raise Refused(
            f"{FLAG} needs a layer spec of megatron-cp, got --spec {' '.join(read(args, 'spec') or ['none'])}; pass "
            "--spec megatron_cp.megatron.spec gpt_layer_spec"
        )
    refuse(UNLIKE, args, FLAG)
    experts_of_layers(asked, experts, layers)


def check_exchange(args: Any) -> None:
    """Refuse what an exchange of ours cannot do; ValueError with the rule and a way out."""
    flags, who = ExpertFlags.of(args), _asked(args)
    if flags.ranks_per_node is not None and flags.ranks_per_node < 1:
        raise Refused(f"--moe-ranks-per-node must be at least 1, got {flags.ranks_per_node}; leave it out")
    if flags.ranks_per_node is not None and not flags.two_hops and flags.degrees is None:
        raise Refused(
            f"--moe-ranks-per-node {flags.ranks_per_node} is of an exchange between nodes; add --moe-comm-type "
            "two-hop, or leave it out"
        )
    check_pieces(flags.pieces)
    if not flags.exchanges:
        return
    if not read(args, "num_experts"):
        raise Refused(f"{who} is of experts; add --num-experts, or leave it out")
    if (dispatcher := read(args, "moe_token_dispatcher_type")) != "alltoall":
        raise Refused(
            f"{who} is of the dispatcher alltoall, got --moe-token-dispatcher-type {dispatcher}; pass alltoall"
        )
    if not has_our_layers(args):
        raise Refused(
            f"{who} needs a layer spec of megatron-cp, got --spec {' '.join(read(args, 'spec') or ['none'])}; pass "
            "--spec megatron_cp.megatron.spec gpt_layer_spec"
        )
    refuse(UNEXCHANGED, args, who)
    if flags.pieces > 1:
        refuse(UNCUT, args, f"--moe-pieces {flags.pieces}")
    if flags.exchange.first:
        refuse(UNHELD, args, who)
    if flags.two_hops:
        _check_nodes(args, flags.ranks_per_node)


def _asked(args: Any) -> str:
    flags = ExpertFlags.of(args)
    if flags.degrees is not None:
        # what it takes first is not what was asked for
        return f"--moe-comm-type {TUTEL}"
    if flags.places and flags.pieces == 1 and flags.exchange.name == MEGATRONS:
        return f"--moe-placement {PLACEMENTS.get(flags.placement).name}"
    if flags.gathers and flags.pieces == 1 and flags.exchange.name == MEGATRONS:
        return f"--moe-gather {flags.gather}"
    if flags.exchange.name != MEGATRONS or flags.pieces == 1:
        return f"--moe-comm-type {EXCHANGES.get(flags.comm_type).name}"
    return f"--moe-pieces {flags.pieces}"


def _check_nodes(args: Any, per_node: int | None) -> None:
    ranks_on_nodes(args.world_size, args.expert_model_parallel_size, tensor_ranks(args), per_node or node_ranks(args))


def node_ranks(args: Any) -> int:
    """Return the ranks of the run on a node: as many as torchrun has started, or all."""
    return int(config.variable("LOCAL_WORLD_SIZE") or 0) or int(read(args, "world_size", 1))


def tensor_ranks(args: Any) -> int:
    """Return the ranks that share each expert."""
    return int(read(args, "expert_tensor_parallel_size") or read(args, "tensor_model_parallel_size", 1))


def check_experts(args: Any) -> None:
    """Refuse what --moe-grouped-gemm cannot do without TransformerEngine; ValueError with the rule and a way out."""
    asked = ExpertFlags.of(args).grouped_product
    name = asked if asked == AUTO else PRODUCTS.get(asked).name
    local = read(args, "transformer_impl", "local") == "local"
    if not (read(args, "moe_grouped_gemm", False) and read(args, "num_experts") and local and has_our_layers(args)):
        if name != AUTO:
            _refuse_alone(args, name, local)
        return
    refuse(UNSUPPORTED, args, "--moe-grouped-gemm with --transformer-impl local")
    if name not in (AUTO, LOOP):
        _check_alignment(args, name)


def check_router(args: Any) -> None:
    """Refuse what a router of ours cannot do; ValueError with the rule and a way out."""
    flags = ExpertFlags.of(args)
    entry, size = ROUTERS.get(flags.router), flags.group_tokens
    if size is not None and (not flags.drops or size < 1):
        raise Refused(
            f"--moe-group-tokens needs at least 1 token and a --moe-router that drops tokens, got {size} and "
            f"{entry.name}; change them, or leave it out"
        )
    if not flags.drops:
        return
    who = f"--moe-router {entry.name}"
    if not read(args, "num_experts"):
        raise Refused(f"{who} is of experts; add --num-experts, or leave it out")
    if not has_our_layers(args):
        raise Refused(
            f"{who} needs a layer spec of megatron-cp, got --spec {' '.join(read(args, 'spec') or ['none'])}; pass "
            "--spec megatron_cp.megatron.spec gpt_layer_spec"
        )
    refuse(UNROUTED, args, who)
    _check_choices(args, who, entry)
    if flags.mixes:
        _check_mlp(args, who)
    if size is not None:
        _check_groups(args, size)


def _check_choices(args: Any, who: str, entry: ExpertRouter) -> None:
    if (choices := read(args, "moe_router_topk", 2)) != entry.choices:
        raise Refused(
            f"{who} takes --moe-router-topk {entry.choices}, got {choices}; pass {entry.choices}, or extend "
            f"{entry.preset}"
        )
    before = bool(read(args, "moe_router_pre_softmax", False))
    if before and entry.choices != 1:
        raise Refused(f"{who} has gates with a sum of 1, got --moe-router-pre-softmax; leave it out")
    factor = read(args, "moe_expert_capacity_factor")
    if factor is None or factor <= 0:
        raise Refused(
            f"{who} needs a --moe-expert-capacity-factor above 0, got {factor}; pass 1.25, or extend {entry.preset}"
        )


def _check_mlp(args: Any, who: str) -> None:
    refuse(UNMIXED, args, who)
    width = read(args, "moe_shared_expert_intermediate_size")
    gate = "a gate" if read(args, "moe_shared_expert_gate", False) else "no gate"
    if not width or gate == "no gate":
        raise Refused(
            f"{who} needs --moe-shared-expert-intermediate-size, the width of its MLP, and --moe-shared-expert-gate, "
            f"got {width} and {gate}; pass both"
        )


def _check_groups(args: Any, size: int) -> None:
    cp, length = read(args, "context_parallel_size", 1), read(args, "seq_length") or size
    tp = read(args, "tensor_model_parallel_size", 1) if read(args, "sequence_parallel", False) else 1
    # the shortest stretch of consecutive tokens that a rank has, in the layouts of a stream but stripes
    stretch = length // math.lcm(2 * cp, cp * tp) if cp > 1 else length // tp
    if stretch % size:
        raise Refused(
            f"--moe-group-tokens must divide the {stretch} consecutive tokens that a rank has at least, got {size}; "
            "change it, --seq-length or the sizes of context and tensor parallelism"
        )


def _balances(args: Any) -> list[str]:
    kinds = read(args, "moe_router_load_balancing_type") or []
    return [kinds] if isinstance(kinds, str) else kinds


def _refuse_alone(args: Any, name: str, local: bool) -> None:
    who = f"--moe-grouped-product {name}"
    if not read(args, "num_experts") or not read(args, "moe_grouped_gemm", False):
        raise Refused(
            f"{who} is of experts that run together; add --num-experts and --moe-grouped-gemm, or leave it out"
        )
    if not local:
        raise Refused(f"{who} is of local experts, got --transformer-impl {args.transformer_impl}; pass local")
    raise Refused(
        f"{who} needs a layer spec of megatron-cp, got --spec {' '.join(read(args, 'spec') or ['none'])}; pass --spec "
        f"megatron_cp.megatron.spec gpt_layer_spec"
    )


def _check_alignment(args: Any, name: str) -> None:
    half = read(args, "bf16", False) or read(args, "fp16", False)
    multiple = ROW_BYTES // (2 if half else 4)
    ranks = read(args, "expert_tensor_parallel_size") or read(args, "tensor_model_parallel_size", 1)
    width = read(args, "moe_ffn_hidden_size") or read(args, "ffn_hidden_size")
    for flag, size, parts in (("--hidden-size", args.hidden_size, 1), ("--moe-ffn-hidden-size", width, ranks)):
        if size and size % (multiple * parts):
            raise Refused(
                f"--moe-grouped-product {name} needs {flag} to be a multiple of {multiple * parts}, rows of "
                f"{ROW_BYTES} bytes on each of {parts} ranks, got {size}; use {LOOP}"
            )
