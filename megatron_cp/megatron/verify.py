"""After the model is built: every layer must have our attention, and one line says what runs."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import torch
from megatron.core.transformer.attention import Attention
from torch import nn

from megatron_cp.megatron.attention import CoreAttention


def verify_models[Model: nn.Module](models: list[Model]) -> list[Model]:
    """Verify every attention of the model chunks and print the banner once; a post-wrap hook of Megatron's.

    Raises RuntimeError naming the layers whose core attention is not ours: with context parallelism such a layer
    would see only this rank's tokens, or cut the sequence in another way.
    """
    attentions = [(name, module) for model in models for name, module in _attentions(model)]
    foreign = [f"{name} ({type(core).__name__})" for name, core in attentions if not isinstance(core, CoreAttention)]
    if foreign:
        raise RuntimeError(
            f"some layers do not have megatron-cp's attention: {', '.join(foreign)}; "
            f"all layers must have it, check --spec and how multi-token prediction is built"
        )
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        device = next((parameter.device.type for model in models for parameter in model.parameters()), "cpu")
        for line in banner([core for _, core in attentions], device):
            print(f"[megatron-cp] {line}", flush=True)
    return models


def banner(cores: Sequence[CoreAttention], device: str) -> list[str]:
    """What runs on such a device, a line for each stretch of layers that agree."""
    numbered = [(core.layer_number, core.describe(device)) for core in cores]
    return [f"{_layers([number for number, _ in group])}: {text}" for text, group in _stretches(numbered)]


def _attentions(model: nn.Module) -> Iterable[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            yield f"{name}.core_attention", module.core_attention


def _stretches(numbered: list[tuple[int, str]]) -> list[tuple[str, list[tuple[int, str]]]]:
    return [(text, list(group)) for text, group in groupby(numbered, key=lambda pair: pair[1])]


def _layers(numbers: list[int]) -> str:
    return f"layer {numbers[0]}" if len(numbers) == 1 else f"layers {numbers[0]}-{numbers[-1]}"
