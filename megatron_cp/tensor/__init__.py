"""Registry of the engines of tensor-parallel linears. Pure: an engine is imported with its first use."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_cp.registry import Registry

if TYPE_CHECKING:
    from megatron_cp.tensor.engine import Engine

__all__ = ["ENGINES", "LinearEngine"]


@dataclass(frozen=True, kw_only=True)
class LinearEngine:
    """One way to communicate around the products of a linear.

    load: imports its class
    what: one line for tables
    """

    name: str
    load: "Callable[[], type[Engine]]"
    what: str
    needs: str = "nothing"
    aliases: tuple[str, ...] = ()


def _collective() -> "type[Engine]":
    from megatron_cp.tensor.collective import CollectiveEngine

    return CollectiveEngine


def _ring() -> "type[Engine]":
    from megatron_cp.tensor.ring import RingEngine

    return RingEngine


def _symmetric() -> "type[Engine]":
    from megatron_cp.tensor.symmetric import SymmetricEngine

    return SymmetricEngine


ENGINES = Registry(
    "tensor-parallel engine",
    [
        LinearEngine(
            name="collective",
            load=_collective,
            what="an all-gather before the product, a reduce-scatter after it",
        ),
        LinearEngine(
            name="ring",
            load=_ring,
            what="a product for each rank's tokens, beside the message of the next one; partial results added in fp32",
        ),
        LinearEngine(
            name="symmetric",
            load=_symmetric,
            what="torch's fused products over symmetric memory",
            needs="GPUs that reach each other's memory",
        ),
    ],
)
