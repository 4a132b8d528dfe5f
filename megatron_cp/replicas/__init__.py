"""Registries of how replicas meet: what islands go on from after steps of their own, and how messages are quantised.

Pure: the arithmetic is imported with its first use.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_cp.registry import Registry

if TYPE_CHECKING:
    from megatron_cp.replicas.outer import OuterStep

__all__ = ["AVERAGE", "INT4", "INT8", "NESTEROV", "OUTERS", "QUANTISATIONS", "SCALE", "OuterOptimizer", "Quantisation"]

SCALE = 4
"""Bytes of a scale of quantised numbers."""


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


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """How numbers are quantised for a message.

    bits:  of a number
    block: numbers that share a scale
    keeps: True if what it rounds off is kept and added in the next step
    """

    name: str
    bits: int
    block: int
    paper: str
    what: str
    keeps: bool = False
    aliases: tuple[str, ...] = ()

    @property
    def bytes(self) -> float:
        """Bytes of a number in a message, with its part of the scale."""
        return self.bits / 8 + SCALE / self.block


INT8 = "int8"
INT4 = "int4"

QUANTISATIONS = Registry(
    "quantisation",
    [
        Quantisation(
            name=INT8,
            bits=8,
            block=256,
            paper="ZeRO++ (arXiv:2306.10209)",
            what="8 bits a number, a scale for each 256",
        ),
        Quantisation(
            name=INT4,
            bits=4,
            block=64,
            paper="ZeRO++ (arXiv:2306.10209), error feedback (arXiv:1901.09847)",
            what="4 bits a number, a scale for each 64; what is rounded off is kept and added in the next step",
            keeps=True,
        ),
    ],
)
