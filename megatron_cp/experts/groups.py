"""Exchange `fastermoe`: rows go to one group of ranks after the other (FasterMoE, PPoPP 2022, section 4.2).

The groups stand in a ring: in step s a group sends to the one s places on and gets from the one s places back, so that
both ends of a message are in one step. A step is an all-to-all of the whole group of ranks without rows for most of
them: NCCL sends to those alone that have rows, all in one batch on the communicator that they have already, and a rank
without rows takes part.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from megatron_cp.errors import Refused

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_cp.experts.exchange import HopPlan, TwoHopExchange


class GroupStep(NamedTuple):
    """Ranks that one rank sends to in a step, and those that it gets rows from."""

    to: range
    source: range


def group_size(ranks: int, per_node: int) -> int:
    """Return the size of groups where none is asked for: a node, and 1 where all ranks are on one."""
    return per_node if per_node < ranks and not ranks % per_node else 1


def check_group(size: int, ranks: int) -> None:
    """Raise ValueError unless groups of this size are all of the ranks that share a layer's experts."""
    if size < 1 or ranks % size:
        raise Refused(
            f"--moe-group-ranks must divide the {ranks} ranks that share a layer's experts, got {size}; change it or "
            "--expert-model-parallel-size"
        )


def group_steps(rank: int, ranks: int, size: int) -> list[GroupStep]:
    """Return the steps of a rank, its own group first; `size` divides the number of ranks."""
    groups, own = ranks // size, rank // size
    return [
        GroupStep(*(range(at * size, at * size + size) for at in ((own + step) % groups, (own - step) % groups)))
        for step in range(groups)
    ]


def group_plans(
    exchange: "TwoHopExchange", sends: Sequence[int], recvs: Sequence[int], steps: Sequence[GroupStep]
) -> "list[HopPlan]":
    """Return the plan of each step; communicates nothing.

    exchange:     of one hop, each rank a node of its own
    sends, recvs: rows for, and from, each rank
    """
    return [exchange.plan([_only(sends, step.to)], _only(recvs, step.source)) for step in steps]


def _only(counts: Sequence[int], ranks: range) -> list[int]:
    return [int(count) if rank in ranks else 0 for rank, count in enumerate(counts)]


def by_step(rows: "Tensor", sends: Sequence[int], steps: Sequence[GroupStep]) -> "Iterator[Tensor]":
    """Yield the rows of each step, of rows [T ...] in order of the rank that they are for."""
    ends = [sum(sends[:rank]) for rank in range(len(sends) + 1)]
    return (rows[ends[step.to.start] : ends[step.to.stop]] for step in steps)


def in_rank_order[Part](parts: Sequence[Part], steps: Sequence[GroupStep]) -> list[Part]:
    """Return what there is of each step in order of the ranks that its rows were for."""
    return [parts[step] for step in sorted(range(len(steps)), key=lambda step: steps[step].to.start)]
