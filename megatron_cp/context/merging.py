"""How partial results are added up: by torch as each comes, or several at a time by one kernel."""

from contextvars import ContextVar
from typing import NamedTuple


class Merging(NamedTuple):
    """How partial results are added up.

    fused:   true if one kernel adds several, false if torch adds each as it comes
    waiting: bytes of each result's parts that may wait for the kernel
    """

    fused: bool
    waiting: int = 0


BY_TORCH = Merging(fused=False)
ONE_BY_ONE = Merging(fused=True)
SEVERAL = Merging(fused=True, waiting=2**28)

ASSUMED: ContextVar[Merging | None] = ContextVar("assumed", default=None)
"""Merging that recordings and tests assume in place of the one for the tensors' device."""
