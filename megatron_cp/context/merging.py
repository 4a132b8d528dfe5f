"""How partial results are added up: by torch as each comes, or several at a time by one kernel."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import NamedTuple

StandIn = Callable[[], None]


class Merging(NamedTuple):
    """How partial results are added up.

    fused:   true if one kernel adds several, false if torch adds each as it comes
    waiting: bytes of each result's parts that may wait for the kernel
    stand_in: called in place of the kernel, where its time is none of what is measured
    """

    fused: bool
    waiting: int = 0
    stand_in: StandIn | None = None


BY_TORCH = Merging(fused=False)
ONE_BY_ONE = Merging(fused=True)
SEVERAL = Merging(fused=True, waiting=2**28)

ASSUMED: ContextVar[Merging | None] = ContextVar("assumed", default=None)
"""Merging that recordings and tests assume in place of the one for the tensors' device."""
