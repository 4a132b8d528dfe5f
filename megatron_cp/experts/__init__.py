"""Registries of experts: how a rank multiplies the tokens of its experts, and how tokens travel to their experts.

Pure: a way is imported with its first use.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_cp.registry import Registry

if TYPE_CHECKING:
    from megatron_cp.experts.product import GroupedProduct

__all__ = [
    "AUTO",
    "EXCHANGES",
    "GROUPED_MM",
    "LOOP",
    "MEGATRONS",
    "PRODUCTS",
    "TWO_HOP",
    "ExpertExchange",
    "ExpertProduct",
]


@dataclass(frozen=True, kw_only=True)
class ExpertProduct:
    """One way to compute a linear of all experts of a rank.

    load: imports its class
    what: one line for tables
    """

    name: str
    load: "Callable[[], type[GroupedProduct]]"
    paper: str
    what: str
    needs: str = "nothing"
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ExpertExchange:
    """One way for tokens to travel to experts of other ranks and back.

    what:     one line for tables
    messages: that a rank sends to other nodes in one exchange, of m nodes with n ranks each
    """

    name: str
    paper: str
    what: str
    messages: str
    aliases: tuple[str, ...] = ()


def _grouped_mm() -> "type[GroupedProduct]":
    from megatron_cp.experts.grouped_mm import GroupedMatmul

    return GroupedMatmul


def _loop() -> "type[GroupedProduct]":
    from megatron_cp.experts.loop import LoopProduct

    return LoopProduct


AUTO = "auto"
"""The way that is taken where none is asked for: chosen for the device and the dtype."""

GROUPED_MM = "grouped-mm"
"""The way of one grouped product."""

LOOP = "loop"
"""The way of one product for each expert."""

PRODUCTS = Registry(
    "product of experts",
    [
        ExpertProduct(
            name=GROUPED_MM,
            load=_grouped_mm,
            paper="MegaBlocks (arXiv:2211.15841)",
            what="one grouped product of torch over the tokens of all experts, whose weights are copied side by side",
            needs="torch's grouped_mm for the device and the dtype, rows of 16 bytes or a multiple",
            aliases=("megablocks",),
        ),
        ExpertProduct(
            name=LOOP,
            load=_loop,
            paper="the experts one by one, as Megatron's SequentialMLP",
            what="a product for each expert that has tokens; activation and autograd once for all experts",
        ),
    ],
)

MEGATRONS = "megatron"
"""The exchange of Megatron's own dispatcher."""

TWO_HOP = "two-hop"
"""The exchange inside nodes and then between them."""

EXCHANGES = Registry(
    "exchange of experts",
    [
        ExpertExchange(
            name=MEGATRONS,
            paper="Megatron-LM",
            what="the dispatcher that --moe-token-dispatcher-type names",
            messages="(m - 1) n with alltoall",
        ),
        ExpertExchange(
            name=TWO_HOP,
            paper="Tutel (arXiv:2206.03382), DeepSpeed-MoE (arXiv:2201.05596)",
            what="the alltoall dispatcher, whose tokens travel inside their node first and then between nodes",
            messages="m - 1",
            aliases=("2dh",),
        ),
    ],
)
