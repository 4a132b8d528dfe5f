"""Collectives over lists of tensors with different numbers of rows, of which gloo refuses one and old ones both.

Megatron's expert tensor parallelism gathers each rank's own number of tokens and scatters them back. The list says all
sizes on every rank, so rows are padded to the longest, sent in equal parts, and cut.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_cp.comm import GroupFabric


def gathered_unevenly(all_gather: Callable[..., Any]) -> Callable[..., Any]:
    """Return torch's all_gather, which also fills a list of tensors [n_r ...] with different n_r."""

    @functools.wraps(all_gather)
    def gathered(tensor_list: Sequence[Tensor], tensor: Tensor, group: Any = None, async_op: bool = False) -> Any:
        if async_op or _even(tensor_list):
            return all_gather(tensor_list, tensor, group=group, async_op=async_op)
        whole = _fabric(group).all_gather(_padded(tensor, tensor_list))
        for part, rows in zip(tensor_list, whole, strict=True):
            part.copy_(rows[: len(part)])
        return None

    return gathered


def scattered_unevenly(reduce_scatter: Callable[..., Any]) -> Callable[..., Any]:
    """Return torch's reduce_scatter, which also adds up a list of tensors [n_r ...] with different n_r."""
    added = torch.distributed.ReduceOp.SUM

    @functools.wraps(reduce_scatter)
    def scattered(
        output: Tensor, input_list: Sequence[Tensor], op: Any = added, group: Any = None, async_op: bool = False
    ) -> Any:
        if async_op or op != added or _even(input_list):
            return reduce_scatter(output, input_list, op=op, group=group, async_op=async_op)
        whole = torch.stack([_padded(rows, input_list) for rows in input_list])
        output.copy_(_fabric(group).reduce_scatter(whole)[: len(output)])
        return None

    return scattered


def _fabric(group: Any) -> GroupFabric:
    whole: Any = torch.distributed.group.WORLD
    return GroupFabric(whole if group is None else group)


def _even(tensors: Sequence[Tensor]) -> bool:
    return len({each.shape for each in tensors}) == 1


def _padded(rows: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Return rows with rows of zeros after them, as many as the longest of the tensors has."""
    return torch.cat([rows, rows.new_zeros(max(map(len, tensors)) - len(rows), *rows.shape[1:])])
