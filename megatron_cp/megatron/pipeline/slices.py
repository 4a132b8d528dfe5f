"""Slices of a sequence in Megatron's models: their data, their positions, and their part of the loss."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from megatron_cp.context.slices import SlicesInFlight
from megatron_cp.errors import Refused


def attach(model: Sequence[Any], slices: SlicesInFlight) -> None:
    """Let attention layers keep keys for later slices, and rotary embeddings start at the slice that runs."""

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
        # b S -> b s
        part = {
            key: value[:, tokens.start : tokens.stop]
            if isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] == length
            else value
            for key, value in self._batch.items()
        }
        mask = self._batch.get("loss_mask")
        if mask is not None:
            self.share = part["loss_mask"].sum() / mask.sum().clamp(min=1)
        return part


def weighted(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return Megatron's forward step with a loss that is the slice's part of the mean over the whole sequence.

    Megatron divides by the tokens of a slice; the sum over slices must be divided by those of the sequence.
    """

    def forward_step(data: Any, *args: Any) -> tuple[Any, Callable[..., Any]]:
        output, loss = step(data, *args)
        share = data.share if isinstance(data, SlicedData) else None

        def of_slice(*given: Any, **kwargs: Any) -> Any:
            result = loss(*given, **kwargs)
            return (result[0] * share, *result[1:]) if share is not None and isinstance(result, tuple) else result

        return output, of_slice

    return forward_step
