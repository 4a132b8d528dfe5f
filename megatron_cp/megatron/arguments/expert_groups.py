"""Checks of the groups of ranks that tokens go to one after the other, before the model is built."""

from typing import Any

from megatron_cp.errors import Refused
from megatron_cp.experts import FASTERMOE
from megatron_cp.experts.groups import check_group, group_size
from megatron_cp.megatron.arguments.experts import UNREPEATED, node_ranks, tensor_ranks
from megatron_cp.megatron.arguments.unsupported import Unsupported, read, refuse
from megatron_cp.megatron.flags.experts import ExpertFlags
from megatron_cp.megatron.run import say

UNGROUPED = (
    Unsupported(
        "tensor-parallel experts, whose ranks gather what they get",
        lambda args: tensor_ranks(args) > 1,
        "pass --expert-tensor-parallel-size 1",
    ),
    *UNREPEATED,
)
"""Options that groups of ranks do not serve."""


def imply_groups(args: Any) -> None:
    """Take a node for a group of ranks, where none is asked for; it refuses nothing."""
    flags, ranks = ExpertFlags.of(args), read(args, "expert_model_parallel_size", 1)
    if flags.by_groups and flags.group_ranks is None and ranks > 1:
        args.moe_group_ranks = group_size(ranks, max(1, node_ranks(args) // tensor_ranks(args)))
        say(f"--moe-comm-type {flags.exchange.name}: --moe-group-ranks {args.moe_group_ranks}")


def check_groups(args: Any) -> None:
    """Refuse groups that tokens cannot go to one after the other; ValueError with the rule and a way out."""
    flags = ExpertFlags.of(args)
    if flags.group_ranks is not None and not flags.by_groups:
        raise Refused(
            f"--moe-group-ranks {flags.group_ranks} is of --moe-comm-type {FASTERMOE} without --moe-pieces; change "
            "those, or leave it out"
        )
    if not flags.by_groups:
        return
    refuse(UNGROUPED, args, f"--moe-comm-type {flags.exchange.name} without --moe-pieces")
    if flags.group_ranks is not None:
        check_group(flags.group_ranks, read(args, "expert_model_parallel_size", 1))
