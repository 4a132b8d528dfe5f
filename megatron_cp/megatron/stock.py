"""What stock attention cannot do and Megatron's argument checks let pass: a run would find out on its GPUs.

The rules are those of transformer-engine's context parallelism, which `--cp-comm-type` is handed to as it is, and of
Megatron's local attention, which has none.
"""

from typing import Any

from megatron_cp.megatron.arguments import comm_types
from megatron_cp.registry import suggest

COMM_TYPES = ("p2p", "all_gather", "a2a", "a2a+p2p")
# those that pass key-value blocks around compute whole rows of blocks only
WINDOWED = ("all_gather", "a2a")


def check(args: Any) -> None:
    """Raise ValueError, with the rule, the value and a way out, for the first thing that stock attention cannot do."""
    cp, names = args.context_parallel_size, comm_types(args)
    for name in names:
        if name not in COMM_TYPES:
            raise ValueError(
                f"unknown --cp-comm-type {name!r}{suggest(name, COMM_TYPES)}; stock attention knows "
                f"{', '.join(COMM_TYPES)}, and others need an entry of megatron-cp"
            )
    if cp == 1:
        return
    if args.transformer_impl == "local":
        raise ValueError(
            f"--transformer-impl local has no context parallelism of its own, got --context-parallel-size {cp}; "
            f"pass --spec megatron_cp.megatron.spec gpt_layer_spec, or take transformer_engine"
        )
    for name in dict.fromkeys(names):
        _check_heads(args, name)
        if getattr(args, "window_size", None) and name not in WINDOWED:
            raise ValueError(
                f"--window-size needs --cp-comm-type {' or '.join(WINDOWED)} with stock attention, got {name}; "
                f"take one of them, or an entry of megatron-cp"
            )


def _check_heads(args: Any, name: str) -> None:
    """Ulysses deals whole query heads and whole KV heads of a tensor-parallel rank, the same number to each rank."""
    if not name.startswith("a2a"):
        return
    sizes, tp = args.hierarchical_context_parallel_sizes, args.tensor_model_parallel_size
    degree = sizes[0] if name == "a2a+p2p" and sizes else args.context_parallel_size
    heads = args.num_attention_heads
    groups = args.num_query_groups if args.group_query_attention else heads
    for flag, count in (("--num-attention-heads", heads), ("--num-query-groups", groups)):
        here = max(1, count // tp)
        if here % degree:
            raise ValueError(
                f"--cp-comm-type {name} of stock attention deals the {flag} of a tensor-parallel rank evenly to "
                f"{degree} ranks, got {count} / TP {tp} = {here}; use a divisor of {here} for it, or p2p"
            )
