"""Parameters of experts whose values travel and whose gradients come home."""

from collections.abc import Sequence

from torch import Tensor, nn

from megatron_cp.megatron.pipeline.split_linear import bound_queue
from megatron_cp.pipeline.split_backward import accumulate


def wait_for_weights(experts: nn.Module) -> None:
    """Let hooks wait for weights that are still being gathered, as in the forward of the modules that have them."""
    for module in experts.modules():
        if module._parameters:
            for key, hook in module._forward_pre_hooks.items():
                if key not in module._forward_pre_hooks_with_kwargs:
                    hook(module, ())


def keep_gradients(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Add gradients to those of the parameters, as a split schedule does."""
    for weight, gradient in zip(weights, gradients, strict=True):
        if weight.requires_grad:
            accumulate(weight, gradient)


def splits_backwards() -> bool:
    """True if a schedule runs whose queue takes the gradients of weights in the place of autograd."""
    queue = bound_queue()
    return queue is not None and queue.open
