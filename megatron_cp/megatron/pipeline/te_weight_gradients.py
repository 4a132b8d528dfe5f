"""TransformerEngine's linears in a split schedule: their own delay of weight gradients behind the schedule's queue.

A module built with `delay_wgrad_compute` leaves the weight gradient of every backward in a first-in-first-out store of
its own, and each `backward_dw` computes the oldest one there. W's of a stage come in the order of its I's, so that what
one I has left is always the oldest when its W comes. Such a module knows no whole backward: a B goes through the queue
too, and is taken out of it at once. TransformerEngine is not imported: a module is known by what it offers.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from megatron_cp.megatron.run import Settings
from megatron_cp.pipeline.split_backward import WeightQueue, accumulate

_MARK = "megatron_cp_delayed"
_COMBINED = ("overlap_moe_expert_parallel_comm", "ep_overlap_early_attn_memory_release")


def delay_weights(old: Callable[..., None], settings: Settings, config: Any, *args: Any) -> None:
    """Check a TransformerConfig as Megatron does; for a split schedule let its linears delay weight gradients.

    Megatron's check allows the delay in an order of its own only, and sees it again in every copy of the config. Its
    check of overlapped messages between experts asks for a virtual pipeline, which two copies of a model are not.
    """
    ours = settings.pipeline.splits and config.transformer_impl == "transformer_engine" and can_delay()
    hidden = {name: getattr(config, name) for name in _COMBINED if settings.combines and settings.pipeline.two_copies}
    if ours:
        config.delay_wgrad_compute = False
    for name in hidden:
        setattr(config, name, False)
    old(config, *args)
    if ours:
        config.delay_wgrad_compute = True
    for name, value in hidden.items():
        setattr(config, name, value)


def can_delay() -> bool:
    """True if TransformerEngine's linears say that they delay; older ones run a whole backward with every I."""
    linear = importlib.import_module("megatron.core.extensions.transformer_engine").TELinear
    return hasattr(linear, "need_backward_dw")


def watch(models: Iterable[nn.Module], queue: WeightQueue | None) -> bool:
    """Let the delayed weight gradients of `models` wait in `queue`; True if any module has some."""
    found = [module for model in models for module in model.modules() if _delays(module)]
    if not found:
        return False
    assert queue, "linears that delay their weight gradients need the hook weight-queue"
    for module in found:
        # a second schedule of the same model finds the first one's
        if not hasattr(module, _MARK):
            setattr(module, _MARK, _Delayed(module, queue))
    queue.always = True
    return True


def _delays(module: Any) -> bool:
    # Megatron's modules that only hand the call on have no need of their own
    return hasattr(module, "need_backward_dw") and bool(module.need_backward_dw())


class _Delayed:
    """A module that owes one weight gradient for every time that a backward reaches its output."""

    def __init__(self, module: Any, queue: WeightQueue) -> None:
        self._module, self._queue = module, queue
        self._weights = [
            weight for weight in module.parameters(recurse=False) if getattr(weight, "skip_backward_post_hook", False)
        ]
        module.register_forward_hook(self._forwarded)

    def _forwarded(self, module: Any, given: Any, made: Any) -> None:
        while isinstance(made, tuple):
            made = made[0]
        if self._queue.open and made.requires_grad and any(weight.requires_grad for weight in self._weights):
            # runs right before the module's own backward
            made.register_hook(self._reached)

    def _reached(self, gradient: Tensor) -> None:
        self._queue.put(self._weight_half)

    def _weight_half(self) -> None:
        # what is computed without a fused kernel overwrites the weight's gradient
        before = [weight.grad for weight in self._weights]
        for weight in self._weights:
            weight.grad = None
        self._module.backward_dw()
        for weight, gradient in zip(self._weights, before, strict=True):
            made, weight.grad = weight.grad, gradient
            if made is not None:
                accumulate(weight, made)


@contextmanager
def gradients_to_come(chunk: Any) -> Iterator[None]:
    """Let Megatron's hook accept weights without a gradient, which it refuses where it overlaps reductions.

    Nothing is lost: a step's reductions start when its stages are done.
    """
    settings: Any = getattr(chunk, "ddp_config", None)
    overlaps = getattr(settings, "overlap_grad_reduce", False)
    if overlaps:
        settings.overlap_grad_reduce = False
    try:
        yield
    finally:
        if overlaps:
            settings.overlap_grad_reduce = True
