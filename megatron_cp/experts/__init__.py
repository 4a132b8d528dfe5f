"""Registries of experts: how a rank multiplies the tokens of its experts, how tokens travel to them, which of them a
token sees, and where copies of busy experts are placed.

Pure: a way is imported with its first use.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_cp.registry import Registry

if TYPE_CHECKING:
    from megatron_cp.experts.product import GroupedProduct
    from megatron_cp.experts.slots import Counts, SlotCosts, SlotPlan

__all__ = [
    "AUTO",
    "DEEPSPEED_MOE",
    "EXCHANGES",
    "FASTERMOE",
    "GROUPED_MM",
    "GSHARD",
    "LOOP",
    "MEGATRONS",
    "NONE",
    "PIPELINED",
    "PLACEMENTS",
    "PRODUCTS",
    "ROUTERS",
    "SWITCH",
    "TOKENS",
    "TUTEL",
    "TWO_HOP",
    "WEIGHTS",
    "ExpertExchange",
    "ExpertPlacement",
    "ExpertProduct",
    "ExpertRouter",
]

type Propose = "Callable[[SlotPlan, Counts, SlotCosts], SlotPlan]"


@dataclass(frozen=True, kw_only=True)
class ExpertProduct:
    """One way to compute a linear of all experts of a rank.

    load:   imports its class
    what:   one line for tables
    preset: the file of configs/ that has its flags; empty where there is none
    """

    name: str
    load: "Callable[[], type[GroupedProduct]]"
    paper: str
    what: str
    needs: str = "nothing"
    preset: str = ""
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ExpertExchange:
    """One way for tokens to travel to experts of other ranks and back.

    what:     one line for tables
    messages: that a rank sends to other nodes in one exchange, of m nodes with n ranks each
    pieces:   into which tokens are cut where --moe-pieces does not say
    ahead:    pieces that have left beside the one that is computed; None for all of them
    groups:   where --moe-pieces does not say, rows go to one group of ranks after the other
    first:    reductions of gradients wait for it in backward
    preset:   the file of configs/ that has its flags; empty where there is none
    """

    name: str
    paper: str
    what: str
    messages: str
    pieces: int = 1
    ahead: int | None = 1
    groups: bool = False
    first: bool = False
    preset: str = ""
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ExpertPlacement:
    """One policy for the copies of experts in spare slots.

    load:   imports its `propose`, a pure function of the plan in force, the counts that it goes by, and costs
    keep:   share of what it went by before in what it goes by now
    what:   one line for tables
    preset: the file of configs/ that has its flags
    """

    name: str
    load: Callable[[], Propose]
    keep: float
    paper: str
    what: str
    preset: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ExpertRouter:
    """One rule for the experts that a token sees.

    what:    one line for tables
    choices: experts of a token, at most; None for as many as --moe-router-topk says
    preset:  the file of configs/ that has its flags; empty where there is none
    """

    name: str
    paper: str
    what: str
    choices: int | None = None
    preset: str = ""
    aliases: tuple[str, ...] = ()


def _fastermoe() -> Propose:
    from megatron_cp.experts.fastermoe import propose

    return propose


def _flexmoe() -> Propose:
    from megatron_cp.experts.flexmoe import propose

    return propose


def _lina() -> Propose:
    from megatron_cp.experts.lina import propose

    return propose


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
            preset="training/megablocks",
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

PIPELINED = "pipelined"
"""The exchange in pieces, of which the next leaves before one is computed."""

FASTERMOE = "fastermoe"
"""The exchange with one group of ranks after the other, to all of which rows leave before the first go home."""

TUTEL = "tutel"
"""The exchange whose pieces, hops and gathers are chosen for the tokens of a step."""

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
            aliases=("2dh", "deepspeed-moe"),
        ),
        ExpertExchange(
            name=PIPELINED,
            paper="Tutel (arXiv:2206.03382)",
            what="the alltoall dispatcher in pieces: one leaves before the one ahead of it is computed, then that goes "
            "home",
            messages="(m - 1) n for each piece",
            pieces=2,
        ),
        ExpertExchange(
            name=FASTERMOE,
            paper="FasterMoE (PPoPP 2022)",
            what="the alltoall dispatcher to one group of ranks after the other, or in pieces, all of which leave "
            "before the first goes home",
            messages="(m - 1) n, or as many for each piece",
            ahead=None,
            groups=True,
            preset="training/fastermoe",
        ),
        ExpertExchange(
            name="lina",
            paper="Lina (USENIX ATC 2023)",
            what="the alltoall dispatcher in pieces as with pipelined; reductions of gradients wait for the next "
            "exchange of backward",
            messages="(m - 1) n for each piece",
            pieces=2,
            first=True,
            preset="training/lina",
        ),
        ExpertExchange(
            name=TUTEL,
            paper="Tutel (arXiv:2206.03382)",
            what="one exchange or two hops, in 1, 2, 4 or 8 pieces, with tokens or weights gathered, as is fastest for "
            "a step's tokens",
            messages="of what it takes",
            preset="training/tutel",
            aliases=(AUTO,),
        ),
    ],
)

TOKENS, WEIGHTS = "tokens", "weights"
"""Gathers of ranks that share each expert: of the tokens of all of them, or of the shards of its weights."""

SWITCH = "switch"
"""The router with one expert of a token, and a capacity."""

DEEPSPEED_MOE = "deepspeed-moe"
"""The router with one expert of a token and a capacity, beside an MLP that sees all tokens."""

GSHARD = "gshard"
"""The router with two experts of a token, the second by chance, and a capacity."""

ROUTERS = Registry(
    "router of experts",
    [
        ExpertRouter(
            name=MEGATRONS,
            paper="Megatron-LM",
            what="Megatron's own router, as its --moe-router-… flags say",
        ),
        ExpertRouter(
            name=SWITCH,
            paper="Switch Transformers (arXiv:2101.03961)",
            what="one expert of a token, which takes the first that come, up to its capacity",
            choices=1,
            preset="training/switch",
        ),
        ExpertRouter(
            name=GSHARD,
            paper="GShard (arXiv:2006.16668)",
            what="two experts of a token, the second by chance; an expert takes the first that come of each group",
            choices=2,
            preset="training/gshard",
        ),
        ExpertRouter(
            name=DEEPSPEED_MOE,
            paper="DeepSpeed-MoE (arXiv:2201.05596)",
            what="one expert of a token as with switch, beside an MLP that sees all tokens; a learned share of each",
            choices=1,
            preset="training/deepspeed-moe",
        ),
    ],
)

NONE = "none"
"""No placement: every expert is on its own rank alone."""

PLACEMENTS = Registry(
    "placement of experts",
    [
        ExpertPlacement(
            name="fastermoe",
            load=_fastermoe,
            keep=0.0,
            paper="FasterMoE (PPoPP 2022)",
            what="copies of the busiest experts on every rank, as many as are fastest for the last step's load",
            preset="training/fastermoe",
        ),
        ExpertPlacement(
            name="flexmoe",
            load=_flexmoe,
            keep=0.5,
            paper="FlexMoE (arXiv:2304.03946)",
            what="the plan in force, changed by expand, shrink and migrate while the load is uneven",
            preset="training/flexmoe",
        ),
        ExpertPlacement(
            name="lina",
            load=_lina,
            keep=0.9,
            paper="Lina (USENIX ATC 2023)",
            what="as many copies as an expert is popular in the mean of many steps, in all slots",
            preset="training/lina",
        ),
    ],
)
