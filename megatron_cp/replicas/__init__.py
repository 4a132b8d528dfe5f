"""Registry of the ways in which islands of replicas go on from the mean of their weights, after steps of their own.

Pure: the arithmetic is imported with its first use.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_cp.registry import Registry

if TYPE_CHECKING:
    from megatron_cp.replicas.outer import OuterStep

__all__ = ["AVERAGE", "NESTEROV", "OUTERS", "OuterOptimizer"]


@dataclass(frozen=True, kw_only=True)
class OuterOptimizer:
    """One outer optimizer.

    load:     imports its function
    what:     one line for tables
    learning_rate, momentum: that it takes where none are given; None where it has none
    """

    name: str
    load: "Callable[[], OuterStep]"
    paper: str
    what: str
    learning_rate: float | None = None
    momentum: float | None = None
    aliases: tuple[str, ...] = ()

    @property
    def remembers(self) -> bool:
        """True if it keeps the weights of the last sync and a momentum, 8 bytes a parameter of a rank's shard."""
        return self.momentum is not None


def _average() -> "OuterStep":
    from megatron_cp.replicas.outer import average

    return average


def _nesterov() -> "OuterStep":
    from megatron_cp.replicas.outer import nesterov

    return nesterov


AVERAGE = "average"
"""The one that is taken where none is named."""

NESTEROV = "nesterov"
"""The one that keeps a momentum."""

OUTERS = Registry(
    "outer optimizer",
    [
        OuterOptimizer(
            name=AVERAGE,
            load=_average,
            paper="Local SGD (arXiv:1805.09767), Parallel SGD (arXiv:1606.07365)",
            what="the mean of the islands' weights",
        ),
        OuterOptimizer(
            name=NESTEROV,
            load=_nesterov,
            paper="DiLoCo (arXiv:2311.08105)",
            what="a step of SGD with Nesterov momentum from the weights of the last sync towards the mean",
            learning_rate=0.7,
            momentum=0.9,
            aliases=("diloco",),
        ),
    ],
)
