"""Check rules of stock Megatron that its own argument checks leave to the first step on the GPUs.

The rules of attention are those of transformer-engine's context parallelism, which gets `--cp-comm-type` as it is, and
of Megatron's local attention, which has none. Megatron checks those of pipelines when it builds the model, and in the
first step.
"""

from typing import Any

from megatron_cp.errors import Refused
from megatron_cp.megatron.arguments.context import comm_types
from megatron_cp.megatron.arguments.pipeline import micros_of
from megatron_cp.megatron.arguments.unsupported import read
from megatron_cp.registry import suggest

COMM_TYPES = ("p2p", "all_gather", "a2a", "a2a+p2p")
# those that pass key-value blocks around compute whole rows of blocks only
WINDOWED = ("all_gather", "a2a")


def check_pipeline(args: Any, config: Any) -> None:
    """Raise AssertionError or ValueError where layers do not divide into stages, or microbatches into groups."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    pp, chunks = args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size
    # a layout of its own says the layers of every stage, and was checked when it was parsed
    for rank in range(pp) if config.pipeline_model_parallel_layout is None else ():
        for chunk in range(chunks or 1):
            get_num_layers_to_build(config, vp_stage=chunk if chunks else None, pp_rank=rank)
    if chunks is None or getattr(args, "pp_schedule", None):
        return
    group = config.microbatch_group_size_per_vp_stage
    train = "step_batch_size_schedule" if read(args, "step_batch_size_schedule") else "global_batch_size"
    evaluates = read(args, "eval_iters") or read(args, "full_validation")
    evaluated = args.eval_global_batch_size // args.data_parallel_size // args.eval_micro_batch_size
    for flag, counts in ((train, micros_of(args)), ("eval_global_batch_size", [evaluated] if evaluates else [])):
        for micros in counts:
            if micros < group or 0 < micros % group < pp:
                raise Refused(
                    f"--pipeline-model-parallel-size {pp} with chunks takes {group} microbatches at a time, "
                    f"got {micros} from --{flag.replace('_', '-')} {getattr(args, flag)}; use a multiple of {group}, "
                    f"or leave --num-virtual-stages-per-pipeline-rank out"
                )


def check_attention(args: Any) -> None:
    """Raise ValueError, with the rule, the value and a way out, for the first thing that stock attention cannot do."""
    cp, names = args.context_parallel_size, comm_types(args)
    for name in names:
        if name not in COMM_TYPES:
            raise Refused(
                f"unknown --cp-comm-type {name!r}{suggest(name, COMM_TYPES)}; stock attention knows "
                f"{', '.join(COMM_TYPES)}, and others need an entry of megatron-cp"
            )
    if cp == 1:
        return
    if args.transformer_impl == "local":
        raise Refused(
            f"--transformer-impl local has no context parallelism of its own, got --context-parallel-size {cp}; "
            f"pass --spec megatron_cp.megatron.spec gpt_layer_spec, or take transformer_engine"
        )
    for name in dict.fromkeys(names):
        _check_heads(args, name)
        if getattr(args, "window_size", None) and name not in WINDOWED:
            raise Refused(
                f"--window-size needs --cp-comm-type {' or '.join(WINDOWED)} with stock attention, got {name}; "
                f"take one of them, or an entry of megatron-cp"
            )


def _check_heads(args: Any, name: str) -> None:
    """Check that Ulysses can give each rank equally many query heads and KV heads of a tensor-parallel rank."""
    if not name.startswith("a2a"):
        return
    sizes, tp = args.hierarchical_context_parallel_sizes, args.tensor_model_parallel_size
    degree = sizes[0] if name == "a2a+p2p" and sizes else args.context_parallel_size
    heads = args.num_attention_heads
    groups = args.num_query_groups if args.group_query_attention else heads
    for flag, count in (("--num-attention-heads", heads), ("--num-query-groups", groups)):
        here = max(1, count // tp)
        if here % degree:
            raise Refused(
                f"--cp-comm-type {name} of stock attention splits the {flag} of a tensor-parallel rank evenly over "
                f"{degree} ranks, got {count} / TP {tp} = {here}; use a divisor of {here} for it, or p2p"
            )
