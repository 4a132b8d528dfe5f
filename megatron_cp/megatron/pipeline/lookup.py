"""Which function runs a pipeline step: ours where the arguments name a schedule, Megatron's elsewhere."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

MOST_SCHEDULES = 4
"""Schedules whose pipelines one process keeps: a run has one, and one more where it evaluates with another."""


def forward_backward(old: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's `get_forward_backward_func` that knows our schedules; each keeps one `Pipeline` while it is bound."""

    @lru_cache(MOST_SCHEDULES)
    def pipeline(name: str) -> Any:
        from megatron_cp.megatron.pipeline.schedule import Pipeline

        return Pipeline(name)

    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Any:
        from megatron_cp.megatron.pipeline.schedule import name_in_force

        name = name_in_force(*args, **kwargs)
        return pipeline(name) if name else old(*args, **kwargs)

    return get_forward_backward_func
