"""MLP, output layer and loss in chunks of a rank's tokens, of which one is in memory at a time.

Megatron's --mlp-chunks-for-training runs an MLP on one chunk after the other, and keeps what each has computed for the
backward pass, so that nothing is saved. Here a chunk keeps its input alone, and its backward pass computes the rest
again. --cp-loss-chunks does so with output layer and loss: all logits of a rank are never in memory together.

Source: Yao et al. 2024, FPDT, arXiv:2408.16978; Bekman et al. 2025, ALST, arXiv:2506.13996.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_cp.megatron.pipeline.split_linear import bound_queue
from megatron_cp.megatron.run import Settings


def free_mlp_chunks[Model: nn.Module](models: list[Model]) -> list[Model]:
    """Let the dense MLPs of built models free each chunk of --mlp-chunks-for-training; a post-wrap hook for Megatron.

    Those in FP8 or FP4, whose checkpoints are transformer-engine's, and mixtures of experts stay as they are.
    """
    for layer in (module for model in models for module in model.modules()):
        if not isinstance(layer, TransformerLayer) or not isinstance(layer.mlp, MLP) or layer.recompute_mlp:
            continue
        config = layer.config
        if config.mlp_chunks_for_training > 1 and not (config.fp8 or config.fp4):
            layer.mlp.forward = partial(_again, layer.mlp)  # type: ignore[method-assign]
    return models


def _again(mlp: MLP, *args: Any, **kwargs: Any) -> Any:
    """Run the MLP on a chunk; in training its backward pass does so once more."""
    if not (mlp.training and torch.is_grad_enabled()):
        return type(mlp).forward(mlp, *args, **kwargs)
    return _computed_again(type(mlp).forward, mlp, *args, **kwargs)


def _computed_again(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # no dropout is inside; gradients of weights are added up over the chunks before any hook of theirs runs
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def put_off_logits(old: Callable[..., None], settings: Settings, model: Any, *args: Any, **kwargs: Any) -> None:
    """Set a model's embedding and output layer up as Megatron does; its loss then asks for logits chunk by chunk."""
    old(model, *args, **kwargs)
    chunks = settings.attention.loss_chunks if settings.our_layers and settings.attention else None
    if chunks is None or not isinstance(getattr(model, "output_layer", None), nn.Module):
        return
    layer, scale, loss_of = model.output_layer, model._scale_logits, model.compute_language_model_loss

    def put_off(hidden: Tensor, *how: Any, **named: Any) -> tuple["Logits", None]:
        # its class is chosen when the model is complete
        compute = lambda part: scale(type(layer).forward(layer, part, *how, **named)[0])  # noqa: E731
        return Logits(hidden, compute, loss_of, chunks), None

    layer.forward = put_off
    model._scale_logits = lambda logits: logits if isinstance(logits, Logits) else scale(logits)
    model.compute_language_model_loss = lambda labels, logits: (
        logits.losses(labels) if isinstance(logits, Logits) else loss_of(labels, logits)
    )


@dataclass(frozen=True)
class Logits:
    """Logits that are computed where a loss asks for them.

    hidden:  states [s b h]; under sequence parallelism those of this rank alone
    compute: maps states of some of these tokens to their logits [t b v], of all tensor-parallel ranks' tokens
    loss_of: maps labels [b t] and logits to losses [b t], as Megatron's model does
    chunks:  that are computed one after the other; the last may be shorter, and an input shorter than all has fewer
    """

    hidden: Tensor
    compute: Callable[[Tensor], Tensor]
    loss_of: Callable[[Tensor, Tensor], Tensor]
    chunks: int

    def losses(self, labels: Tensor) -> Tensor:
        """Return the losses [b t] of labels [b t]; their backward pass computes each chunk's logits again."""
        parts = self._parts(labels)
        made = [_computed_again(self._losses_of, part, own.flatten(1)) for part, own in parts]
        return torch.cat([loss.view_as(own) for loss, (_, own) in zip(made, parts, strict=True)], 2).flatten(1)

    def counts(self, count: Callable[..., tuple[Tensor, Tensor]], labels: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """Return what `count` makes of logits, labels and loss mask, added up over the chunks; without gradients."""
        masks = (own for _, own in self._parts(mask))
        with torch.no_grad():
            made = [
                count(self._of(part), own.flatten(1), kept.flatten(1))
                for (part, own), kept in zip(self._parts(labels), masks, strict=True)
            ]
        return tuple(torch.stack(each).sum(0) for each in zip(*made, strict=True))

    def transpose(self, *axes: int) -> Tensor:
        """Return all logits [t b v], their axes exchanged: Megatron asks for them so where there are no labels."""
        return self._of(self.hidden).transpose(*axes)

    def _parts(self, of_tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return each chunk of the states with its part [b r s] of something [b t] that every token has.

        r are the ranks whose tokens the output layer gathers, in their order; a chunk has some tokens of each.
        """
        hidden = self.hidden.chunk(self.chunks)
        # b (r s) -> b r s
        ranked = of_tokens.unflatten(1, (-1, len(self.hidden)))
        return list(zip(hidden, ranked.split([len(part) for part in hidden], dim=2), strict=True))

    def _losses_of(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return self.loss_of(labels, self._of(hidden))

    def _of(self, hidden: Tensor) -> Tensor:
        # gradients of logits that wait for W would be all of them
        with _weights_at_once():
            return self.compute(hidden)


def _weights_at_once() -> AbstractContextManager[None]:
    queue = bound_queue()
    return nullcontext() if queue is None else queue.closed()


def accepted(
    old: Callable[..., tuple[Tensor, ...]],
    settings: Settings,
    mtp_logits: Any,
    mtp_labels: Tensor,
    loss_mask: Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, ...]:
    """Count the tokens that multi-token prediction gets right as Megatron does, chunk by chunk."""

    def count(logits: Any, labels: Tensor, mask: Tensor) -> Any:
        return old(logits, labels, mask, *args, **kwargs)

    if isinstance(mtp_logits, Logits):
        return mtp_logits.counts(count, mtp_labels, loss_mask)
    return old(mtp_logits, mtp_labels, loss_mask, *args, **kwargs)
