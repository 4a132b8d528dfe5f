"""Leave out of Megatron's step the sums over the ranks of a pipeline, so that no rank waits for another.

No update depends on them: nothing is clipped by the norm of all gradients, and without a loss scale every update
succeeds.
"""

from collections.abc import Callable
from typing import Any

from megatron_cp.megatron.run import Settings


def no_norm(old: Callable[..., Any], settings: Settings, optimizer: Any) -> Any:
    """Return no norm of the gradients, which the log then leaves out."""
    return None if settings.pipeline.free_running else old(optimizer)


def own(old: Callable[..., Any], settings: Settings, value: Any, *args: Any, **kwargs: Any) -> Any:
    """Return this rank's own value in the place of one for all ranks that hold parts of the model."""
    return value if settings.pipeline.free_running else old(value, *args, **kwargs)
