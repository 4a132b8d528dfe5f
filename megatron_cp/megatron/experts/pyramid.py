"""Layers of a model with different numbers of experts."""

import copy
from functools import partial
from typing import Any


def with_experts(mlp: Any, experts: int) -> Any:
    """Return what builds a layer with so many experts, whatever the model's config says.

    Router, dispatcher and experts read their number from the config that they are built with: the layer has its own.
    """
    return partial(_built, mlp, experts)


def _built(mlp: Any, experts: int, *, config: Any, **rest: Any) -> Any:
    own = copy.copy(config)
    own.num_moe_experts = experts
    return mlp(config=own, **rest)
