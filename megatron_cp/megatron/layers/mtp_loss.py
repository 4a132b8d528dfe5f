"""The loss of multi-token prediction under context parallelism, over the tokens of the whole sequence.

Megatron averages this loss over a rank's own valid tokens and the gradients over the ranks. Their labels are rolled, so
that the rank with the last token has fewer of them, and the mean of means is not the mean: gradients differ from those
of one rank, with and without --calculate-per-token-loss.
"""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.multi_token_prediction import roll_tensor
from torch import Tensor

from megatron_cp.comm import GroupFabric
from megatron_cp.megatron.run import Settings


def over_the_whole_sequence(old: Callable[..., Tensor], settings: Settings, *args: Any, **kwargs: Any) -> Tensor:
    """Call Megatron's `process_mtp_loss` with losses of tokens [b s] that are weighted for the mean of the sequence.

    With n valid tokens on this rank and N on all `ranks` of the context-parallel group, Megatron divides by n and takes
    the mean over the ranks: the weight is n ranks / N. With --calculate-per-token-loss it then multiplies by this
    rank's tokens before labels are rolled, where the mean over the ranks belongs.
    """
    call = inspect.signature(old).bind(*args, **kwargs)
    given = call.arguments
    labels, group = given["labels"], given.get("cp_group")
    if not settings.our_layers or labels is None or group is None or group.size() == 1:
        return old(*args, **kwargs)
    fabric, config, losses_of = GroupFabric(group), given["config"], given["compute_language_model_loss"]
    mask = given.get("loss_mask")
    mask = torch.ones_like(labels) if mask is None else mask

    def weighted(labels: Tensor, logits: Tensor) -> Tensor:
        nonlocal mask
        # each layer predicts one token further than the one before
        mask, own = roll_tensor(mask, cp_group=group, packed_seq_params=given.get("packed_seq_params"))
        weight: Tensor = own.clamp(min=1) * fabric.size / _sum(own, fabric).clamp(min=1)
        losses: Tensor = losses_of(labels, logits)
        return losses * weight

    given["compute_language_model_loss"] = weighted
    if config.calculate_per_token_loss:
        given["config"] = copy.copy(config)
        given["config"].calculate_per_token_loss = False
        given["config"].mtp_loss_scaling_factor *= _sum(mask.sum(), fabric) / fabric.size
    return old(*call.args, **call.kwargs)


def _sum(count: Tensor, fabric: GroupFabric) -> Tensor:
    return fabric.all_gather(count.reshape(1)).sum()
