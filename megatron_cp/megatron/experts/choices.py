"""Choices of Megatron's routers: counted in each microbatch, added up and logged as often as Megatron logs."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from megatron_cp import runlog
from megatron_cp.comm import Collectives
from megatron_cp.experts.choices import Choices
from megatron_cp.experts.pyramid import experts_of_layers
from megatron_cp.megatron.flags.experts import ExpertFlags
from megatron_cp.megatron.hooks import HOOKS, is_on
from megatron_cp.megatron.run import Settings

COUNTED = "megatron_cp_choices"
"""Attribute of Megatron's tracker of experts that holds what this rank has counted, where it counts."""


class CountedChoices:
    """Counts of what the routers of this rank have chosen in training since the last log, by layers of the model.

    config: the model's
    """

    def __init__(self, config: Any) -> None:
        self._layers, self._predicting = config.num_layers, config.mtp_num_layers or 0
        self._dropless = config.moe_expert_capacity_factor is None
        text = ExpertFlags.of(config).layer_experts
        whole = config.num_moe_experts
        self._experts = [*experts_of_layers(text, whole, self._layers), *[whole] * self._predicting]
        device = torch.device(torch.cuda.current_device())
        self._choices = Choices(len(self._experts), max(self._experts), device)

    def count(self, router: TopKRouter, _: Any, routed: tuple[Tensor, Tensor]) -> None:
        """Add the choices of a microbatch; a forward hook of a router.

        A layer that is computed again in backward runs without a graph first, and is counted once.
        """
        if not (router.training and torch.is_grad_enabled()) or router.layer_number is None:
            return
        gates, sent = routed
        if router.config.moe_pad_expert_input_to_capacity:
            # tokens that fill places have no gate there
            sent = sent & (gates.detach() > 0)
        place = router.layer_number - 1 + (self._layers if router.is_mtp_layer else 0)
        self._choices.add(place, len(sent) * router.topk, sent)

    def log(self, iteration: int, folder: str | None) -> str:
        """Add up the choices of all ranks, note them in the folder, and return what the last rank's log line says.

        All ranks of the run call it together; the last one alone waits for its device, as it does to log a loss.
        """
        counts, everyone = self._choices.take(), torch.distributed.group.WORLD
        assert everyone, "Megatron has made the groups"
        last = everyone.size() - 1
        Collectives(everyone).sum_on(counts, last).wait()
        if everyone.rank() != last:
            return ""
        names = [f"decoder layer {number + 1}" for number in range(self._layers)]
        names += [f"mtp layer {number + 1}" for number in range(self._predicting)]
        layers = {
            name: runlog.ExpertChoices(made, tokens[:experts], self._dropless)
            for name, experts, (made, *tokens) in zip(names, self._experts, counts.tolist(), strict=True)
            if made
        }
        if folder:
            runlog.note_experts(Path(folder), iteration, layers)
        made = sum(layer.made for layer in layers.values())
        if self._dropless or not made:
            return ""
        return f" {runlog.DROPPED}: {100 * sum(layer.dropped for layer in layers.values()) / made:.4f} |"


def count_choices[Model: nn.Module](models: list[Model]) -> list[Model]:
    """Count what the routers of these chunks choose, where it will be logged; a post-wrap hook for Megatron."""
    modules = [module for model in models for module in model.modules()]
    config: Any = next((module.config for module in modules if hasattr(module, "config")), None)
    # the capture of a CUDA graph runs a router without training
    captured = getattr(config, "cuda_graph_impl", "none") not in (None, "none")
    if config is None or not config.num_moe_experts or captured or not is_on(HOOKS.get("expert-choices")):
        return models
    counted = CountedChoices(config)
    # a rank without routers takes part in the sum
    setattr(get_moe_metrics_tracker(), COUNTED, counted)
    for router in modules:
        if isinstance(router, TopKRouter):
            router.register_forward_hook(counted.count)
    return models


def report(old: Callable[..., str], settings: Settings, tracker: Any, *args: Any, **kwargs: Any) -> str:
    """Return what Megatron's line says of experts, and where it is printed the share of choices that were dropped."""
    text = old(tracker, *args, **kwargs)
    counted: CountedChoices | None = getattr(tracker, COUNTED, None)
    iteration = inspect.signature(old).bind(tracker, *args, **kwargs).arguments["iteration"]
    if counted is None or settings.log_interval is None or iteration % settings.log_interval:
        return text
    return text + counted.log(iteration, settings.save)
