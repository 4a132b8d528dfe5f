"""Megatron's checkpoints of layers and of attention, which repeat no attention where --cp-keep-attention says so."""

from collections.abc import Callable
from typing import Any

from megatron_cp.context.keep import keeping
from megatron_cp.megatron.run import Settings


def checkpoint(
    old: Callable[..., Any],
    settings: Settings,
    function: Callable[..., Any],
    distribute_saved_activations: bool,
    *args: Any,
) -> Any:
    """Checkpoint `function` as Megatron does, with its attention kept where the run asks for it."""
    kept = settings.attention is not None and settings.attention.keep_attention
    return old(keeping(function) if kept else function, distribute_saved_activations, *args)
