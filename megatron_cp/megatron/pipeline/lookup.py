"""Choose the function that runs a step: ours where the settings name a schedule or a plan, else Megatron's."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron_cp.megatron.run import Settings

if TYPE_CHECKING:
    from megatron_cp.megatron.pipeline.schedule import Pipeline


class ScheduleGetter:
    """Megatron's `get_forward_backward_func` that knows our schedules; every step of a run gets the same Pipeline."""

    def __init__(self, stock: Callable[..., Any]) -> None:
        self._stock = stock
        self._pipeline: Pipeline | None = None

    def __call__(self, settings: Settings, *args: Any, **kwargs: Any) -> Any:
        """Return the function for these settings and Megatron's own arguments of the getter."""
        # a patched Megatron makes the getter while it is being imported itself
        from megatron_cp.megatron.pipeline.planned import PlannedRun
        from megatron_cp.megatron.pipeline.schedule import Pipeline, left_to_megatron

        name = settings.pipeline.schedule
        left = left_to_megatron(*args, **kwargs)
        found = self._stock(*args, **kwargs) if name is None or left else self._of(name, settings)
        planned = settings.attention and settings.attention.plan and not left
        return PlannedRun(found, isinstance(found, Pipeline)) if planned else found

    def _of(self, name: str, settings: Settings) -> "Pipeline":
        from megatron_cp.megatron.pipeline.schedule import Pipeline

        if self._pipeline is None or self._pipeline.settings.pipeline != settings.pipeline:
            self._pipeline = Pipeline(name, settings)
        return self._pipeline
