"""Slices of a sequence in Megatron's models: their data, their positions, and their part of the loss."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_cp.comm import GroupFabric
from megatron_cp.context.slices import SlicesInFlight
from megatron_cp.errors import Refused
from megatron_cp.megatron.run import args_of_run


def attach(model: Sequence[Any], slices: SlicesInFlight) -> None:
    """Let attention layers keep keys for later slices, and rotary embeddings start at the slice that runs.

    Models that hand packed documents on keep those of earlier slices.
    """

    def shifted(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # GPTModel asks for as many positions as its input is long
        return args, {**kwargs, "offset": kwargs.get("offset", 0) + slices.offset}

    modules = [module for chunk in model for module in chunk.modules()]
    layers = [module for module in modules if hasattr(module, "in_slices")]
    if not layers and any(type(module).__name__ == "SelfAttention" for module in modules):
        raise Refused("--pp-slices needs megatron-cp's attention in every layer; leave --spec out")
    for layer in layers:
        layer.in_slices = slices
    for module in modules:
        if isinstance(module, RotaryEmbedding):
            module.register_forward_pre_hook(shifted, with_kwargs=True)


class SlicedData:
    """The batches of an iterator in slices, one after the other.

    share: part of the sequence's tokens with a loss that the last slice has; None where the data has no losses
    """

    def __init__(self, batches: Iterator[dict[str, Any]], tokens: Sequence[range]) -> None:
        self._batches, self._tokens = batches, tokens
        self._batch: dict[str, Any] = {}
        self._next = 0
        self.share: Tensor | None = None

    def __iter__(self) -> "SlicedData":
        return self

    def __next__(self) -> dict[str, Any]:
        if self._next == 0:
            self._batch = next(self._batches)
        tokens, length = self._tokens[self._next], self._tokens[-1].stop
        self._next = (self._next + 1) % len(self._tokens)
        part = {key: _cut(value, tokens, length) for key, value in self._batch.items()}
        if self._batch.get("cu_seqlens") is not None:
            part["cu_seqlens"] = _cut_ends(self._batch["cu_seqlens"], tokens)
        mask = self._batch.get("loss_mask")
        if mask is not None:
            self.share = part["loss_mask"].sum() / mask.sum().clamp(min=1)
        return part


def _cut(value: Any, tokens: range, length: int) -> Any:
    """Return the slice of a tensor with an entry for each token, b S -> b s; other values as they are."""
    if not isinstance(value, Tensor) or value.dim() != 2 or value.shape[1] != length:
        return value
    # a broadcast over tensor-parallel ranks takes one piece of memory
    return value[:, tokens.start : tokens.stop].contiguous()


def _cut_ends(ends: Tensor, tokens: range) -> Tensor:
    """Return the ends of documents inside the slice, b (s + 2), filled up with its length.

    An empty document comes first where the slice starts one.
    """
    inside = [[end - tokens.start for end in dict.fromkeys(row) if end in tokens] for row in ends.tolist()]
    filled = torch.full((len(inside), len(tokens) + 2), len(tokens), dtype=ends.dtype)
    for row, found in zip(filled, inside, strict=True):
        row[0] = 0
        row[1 : len(found) + 1] = torch.tensor(found, dtype=ends.dtype)
    return filled


def in_slices(step: Callable[..., Any], slices: SlicesInFlight) -> Callable[..., Any]:
    """Return Megatron's forward step as it takes samples of a slice's length, one slice after the other.

    The first of the tensor-parallel ranks reads the data and sends it to the others, which make room for --seq-length
    tokens, and packed samples of so many are told apart.
    """

    def forward_step(*args: Any) -> Any:
        known = args_of_run()
        if known is None:
            # a program without Megatron's arguments cuts its samples itself
            return step(*args)
        whole = known.seq_length
        known.seq_length = slices.length
        try:
            return step(*args)
        finally:
            known.seq_length = whole

    return forward_step


def weighted(step: Callable[..., Any], tp_group: ProcessGroup) -> Callable[..., Any]:
    """Return Megatron's forward step with a loss that is the slice's part of the mean over the whole sequence.

    Megatron divides by the tokens of a slice; the sum over slices must be divided by those of the sequence. Of the
    tensor-parallel ranks the first has read the whole sequence, and tells the others the slice's part.
    """

    def forward_step(data: Any, *args: Any) -> tuple[Any, Callable[..., Any]]:
        output, loss = step(data, *args)
        share = data.share if isinstance(data, SlicedData) else None

        def of_slice(*given: Any, **kwargs: Any) -> Any:
            result = loss(*given, **kwargs)
            if not isinstance(result, tuple):
                return result
            part = _from_first(share, result[0], tp_group) if tp_group.size() > 1 else share
            return result if part is None else (result[0] * part, *result[1:])

        return output, of_slice

    return forward_step


def _from_first(share: Tensor | None, like: Tensor, group: ProcessGroup) -> Tensor:
    """Return the first rank's share on all ranks of the group, 1 where it has none."""
    known = like.new_ones(1, dtype=torch.float32)
    if share is not None:
        known.copy_(share)
    return GroupFabric(group).all_gather(known)[0]
