"""Checks of the flag for MLPs in tiles, once Megatron has worked out its sizes."""

from typing import Any

from megatron_cp.errors import Refused
from megatron_cp.megatron.arguments.unsupported import Unsupported, read, refuse
from megatron_cp.megatron.flags.replicas import MlpFlags

UNSUPPORTED = (
    Unsupported(
        "weights that every rank has, nor Megatron-FSDP, which gathers all of a layer together",
        lambda args: not read(args, "use_torch_fsdp2", False),
        "pass --use-torch-fsdp2",
    ),
    Unsupported(
        "weights that stay gathered",
        lambda args: not read(args, "torch_fsdp2_reshard_after_forward", True),
        "leave --torch-fsdp2-no-reshard-after-forward out",
    ),
    Unsupported(
        "MLPs of transformer-engine, whose first linear has the norm in it",
        lambda args: read(args, "transformer_impl", "local") != "local",
        "pass --transformer-impl local",
    ),
    Unsupported(
        "tensor parallelism, which would send the messages of an MLP once for each tile",
        lambda args: read(args, "tensor_model_parallel_size", 1) > 1,
        "pass --tensor-model-parallel-size 1",
    ),
    Unsupported(
        "experts, whose weights are gathered with their layer",
        lambda args: bool(read(args, "num_experts")),
        "leave --num-experts out",
    ),
    Unsupported(
        "an MLP in chunks of tokens, for each of which all tiles would be gathered",
        lambda args: (read(args, "mlp_chunks_for_training") or 1) > 1,
        "leave --mlp-chunks-for-training out",
    ),
)


def check_tiles(args: Any) -> None:
    """Refuse what --mlp-tiles cannot do; ValueError with the rule, the value and a way out."""
    count = MlpFlags.of(args).tiles
    if count is None:
        return
    who = f"--mlp-tiles {count}"
    if count < 2:
        raise Refused(f"{who}: an MLP is cut into 2 tiles or more; leave it out to gather layers whole")
    refuse(UNSUPPORTED, args, who)
    ranks, hidden = args.data_parallel_size * args.context_parallel_size, args.ffn_hidden_size
    if hidden % (count * ranks):
        raise Refused(
            f"{who}: the {ranks} data-parallel and context-parallel ranks have equal shares of each tile, and "
            f"--ffn-hidden-size {hidden} is no multiple of {count} x {ranks}; take another number of tiles"
        )
