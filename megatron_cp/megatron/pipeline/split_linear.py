"""Split the backward of Megatron's linears into two halves.

Column- and row-parallel linears (attention, MLP, local experts, LM head) reach their autograd function through one
name. `SplitLinear`, bound to it, puts weight gradients into a queue while a split schedule runs, and calls Megatron's
own function otherwise.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.amp import custom_bwd

from megatron_cp.pipeline.split_backward import WeightQueue, accumulate, weight_gradient


@dataclass(frozen=True)
class Owner:
    """The parameter whose gradient is computed apart, in an object so that autograd does not see it.

    stock: Megatron's own autograd function
    """

    weight: Tensor
    queue: WeightQueue
    stock: Any


class QueuedLinear(torch.autograd.Function):
    """Megatron's forward, and a backward that leaves the weight gradient to the queue."""

    @staticmethod
    def forward(ctx: Any, owner: Owner, *args: Any) -> Tensor:
        ctx.owner = owner
        output: Tensor = owner.stock.forward(ctx, *args)
        # the fused kernel adds to it in place; the weight that Megatron's forward saw is not the parameter
        ctx.main_grad = getattr(owner.weight, "main_grad", None)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        owner = ctx.owner
        if not owner.queue.putting_off:
            given, weight, *rest = owner.stock.backward(ctx, gradient)
            if weight is not None:
                accumulate(owner.weight, weight)
            return None, given, None, *rest
        return _input_half(ctx, gradient)


@custom_bwd(device_type="cuda")
def _input_half(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    given, weight = ctx.saved_tensors
    with torch.no_grad():
        before = gradient.matmul(weight)
        if ctx.sequence_parallel:
            before = reduce_scatter_to_sequence_parallel_region(before, ctx.tp_group)
        elif ctx.allreduce_dgrad:
            before = reduce_from_tensor_model_parallel_region(before, ctx.tp_group)
    group = ctx.tp_group if ctx.sequence_parallel else None
    ctx.owner.queue.put(
        partial(_weight_half, ctx.owner.weight, group, ctx.gradient_accumulation_fusion), given, gradient
    )
    bias = gradient.reshape(-1, gradient.shape[-1]).sum(dim=0) if ctx.use_bias else None
    return None, before, None, bias, *[None] * 7


def _weight_half(weight: Tensor, sequence_group: Any, fused: bool, given: Tensor, gradient: Tensor) -> None:
    # this rank's part of the sequence waited: 1/p of the memory for one more gather
    if sequence_group is not None:
        given = gather_from_sequence_parallel_region(given, group=sequence_group)
    if fused:
        _accumulate_fused(weight.main_grad, given, gradient)  # type: ignore[attr-defined]
    else:
        accumulate(weight, weight_gradient(given, gradient))


def _accumulate_fused(total: Tensor, given: Tensor, gradient: Tensor) -> None:
    kernels = layers.fused_weight_gradient_mlp_cuda
    add = kernels.wgrad_gemm_accum_fp32 if total.dtype == torch.float32 else kernels.wgrad_gemm_accum_fp16
    add(given.reshape(-1, given.shape[-1]), gradient.reshape(-1, gradient.shape[-1]), total)


class SplitLinear:
    """Replacement for Megatron's autograd function, with the queue of the schedule."""

    def __init__(self, stock: Any) -> None:
        self.stock = stock
        self.queue = WeightQueue()

    def apply(self, given: Tensor, weight: Tensor, *rest: Any) -> Any:
        if not self.queue.open or not _splits(given, weight, *rest):
            return self.stock.apply(given, weight, *rest)
        return QueuedLinear.apply(Owner(weight, self.queue, self.stock), given, weight.detach(), *rest)


def _splits(
    given: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    fused: bool,
    allreduce: bool,
    sequence_parallel: bool,
    deferred: list[Tensor] | None,
    limit: int,
    group: Any,
    gathered_weight: int = 1,
) -> bool:
    """True if this linear's backward can be split; otherwise its weight gradient is computed with the I."""
    # without a gradient of the input there would be no backward at all once the weight is out of autograd
    return weight.requires_grad and weight.is_leaf and given.requires_grad and deferred is None and gathered_weight == 1


def bound_queue() -> WeightQueue | None:
    """Return the queue of the split linear that the hook `weight-queue` has bound; None without the hook.

    Megatron's linears call their autograd function by a name of its module and hand it tensors only, so that there is
    one queue for all linears of the process. A pipeline asks for it once and hands it to whatever uses it.
    """
    bound = layers.LinearWithGradAccumulationAndAsyncCommunication
    return bound.queue if isinstance(bound, SplitLinear) else None
