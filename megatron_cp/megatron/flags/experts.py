"""Flags of experts."""

from dataclasses import dataclass

from megatron_cp.errors import Refused
from megatron_cp.experts import AUTO as AUTO_PRODUCT
from megatron_cp.experts import (
    DEEPSPEED_MOE,
    EXCHANGES,
    FASTERMOE,
    PRODUCTS,
    ROUTERS,
    TOKENS,
    TUTEL,
    TWO_HOP,
    WEIGHTS,
    ExpertExchange,
)
from megatron_cp.experts import MEGATRONS as MEGATRONS_EXCHANGE
from megatron_cp.experts import NONE as NO_PLACEMENT
from megatron_cp.experts import PLACEMENTS as EXPERT_PLACEMENTS
from megatron_cp.experts.degree import check_pieces
from megatron_cp.experts.slot_costs import COPIES_CLUSTER
from megatron_cp.hardware.cluster_file import shipped_clusters
from megatron_cp.megatron.flags.flag import Flags, flag, one_of

COSTS, STEPS = TUNINGS = "costs", "steps"
"""How a choice is made that is kept for a number of tokens: by a cluster's costs, or by measured steps."""

TRIES = 2
"""Steps that are measured with each choice."""


@dataclass(frozen=True, kw_only=True)
class ExpertFlags(Flags):
    """Flags of experts, beside Megatron's own --moe-grouped-gemm."""

    prefix = "moe"
    title = "experts (megatron-cp)"

    grouped_product: str = flag(
        AUTO_PRODUCT,
        lambda: one_of(AUTO_PRODUCT, *PRODUCTS.names),
        lambda: (
            "With --moe-grouped-gemm and --transformer-impl local, how a rank multiplies the tokens of its experts: "
            + "; ".join(f"{entry.name}: {entry.what}" for entry in PRODUCTS)
            + f". {AUTO_PRODUCT} takes grouped-mm where torch has a kernel for the GPU and the dtype, loop elsewhere, "
            "and says why."
        ),
    )
    comm_type: str = flag(
        MEGATRONS_EXCHANGE,
        lambda: one_of(*EXCHANGES.names),
        lambda: (
            "How tokens travel to experts of other ranks and back: "
            + "; ".join(f"{entry.name}: {entry.what}" for entry in EXCHANGES)
            + "."
        ),
    )
    ranks_per_node: int | None = flag(
        None,
        lambda: "N",
        lambda: "With --moe-comm-type two-hop, ranks on a node; by default as many as torchrun has started there.",
        int,
    )

    group_ranks: int | None = flag(
        None,
        lambda: "N",
        lambda: (
            f"With --moe-comm-type {FASTERMOE} and no --moe-pieces, ranks that rows go to in one step, which divide "
            "--expert-model-parallel-size; by default those of a node, and 1 where all experts are on one."
        ),
        int,
    )
    pieces: int = flag(
        1,
        lambda: "N",
        lambda: (
            "Cut routed tokens into N pieces: while experts compute one, the next is on its way, forward and backward. "
            + "By default "
            + ", ".join(f"{entry.pieces} with --moe-comm-type {entry.name}" for entry in EXCHANGES if entry.pieces > 1)
            + "."
        ),
        int,
    )
    gather: str | None = flag(
        None,
        lambda: one_of(TOKENS, WEIGHTS, AUTO_PRODUCT),
        lambda: (
            "What ranks that share each expert (--expert-tensor-parallel-size above 1) gather in a step. "
            f"{TOKENS}: the tokens of all of them, in every microbatch; {WEIGHTS}: the shards of their experts, once, "
            f"and gradients go back to the shards; {AUTO_PRODUCT}: what takes less by the costs of --moe-cluster, for "
            f"the tokens of a step. By default {AUTO_PRODUCT} with --moe-comm-type {TUTEL}, {TOKENS} otherwise."
        ),
    )
    degrees: str | None = flag(
        None,
        lambda: "N,…",
        lambda: f"With --moe-comm-type {TUTEL}, numbers of pieces to choose from, by default 1,2,4,8.",
    )
    tuning: str = flag(
        COSTS,
        lambda: one_of(*TUNINGS),
        lambda: (
            f"With --moe-comm-type {TUTEL} or --moe-gather {AUTO_PRODUCT}, how pieces, hops and gathers are chosen for "
            f"a step's tokens. {COSTS}: by the costs of --moe-cluster; {STEPS}: each choice has {TRIES} steps that are "
            "measured, and the fastest one is kept."
        ),
    )
    router: str = flag(
        MEGATRONS_EXCHANGE,
        lambda: one_of(*ROUTERS.names),
        lambda: "The experts that a token sees: " + "; ".join(f"{entry.name}: {entry.what}" for entry in ROUTERS) + ".",
    )
    group_tokens: int | None = flag(
        None,
        lambda: "N",
        lambda: (
            f"With --moe-router {' or '.join(entry.name for entry in ROUTERS if entry.choices)}, consecutive tokens of "
            "a sample that share out an expert's capacity; by default all tokens of a rank in a microbatch."
        ),
        int,
    )
    layer_experts: str | None = flag(
        None,
        lambda: "LAYER:EXPERTS,…",
        lambda: (
            "Experts of a layer and of all later ones, multiples of --num-experts, which the layers before have: "
            "13:64,23:128 (DeepSpeed-MoE's pyramid)."
        ),
    )

    placement: str = flag(
        NO_PLACEMENT,
        lambda: one_of(NO_PLACEMENT, *EXPERT_PLACEMENTS.names),
        lambda: (
            f"Copies of busy experts in spare slots of other ranks, or {NO_PLACEMENT}: "
            + "; ".join(f"{entry.name}: {entry.what}" for entry in EXPERT_PLACEMENTS)
            + "."
        ),
    )
    replica_slots: int | None = flag(
        None,
        lambda: "K",
        lambda: "With --moe-placement, spare slots of a rank for copies of other ranks' experts, by default 1.",
        int,
    )
    placement_interval: int = flag(
        10,
        lambda: "STEPS",
        lambda: "With --moe-placement, steps between two plans of copies.",
        int,
    )
    copies_ahead: int = flag(
        1,
        lambda: "0|1",
        lambda: (
            "With --moe-placement, layers ahead that weights leave for copies: 1, while the layer before computes, "
            "or 0 for none."
        ),
        int,
    )
    cluster: str | None = flag(
        None,
        lambda: "NAME|FILE",
        lambda: (
            f"With --moe-placement, --moe-comm-type {TUTEL} and --moe-gather {AUTO_PRODUCT}, the cluster by whose "
            "costs copies, pieces, hops and gathers are chosen: "
            + ", ".join(shipped_clusters())
            + f", or a YAML file. By default {COPIES_CLUSTER} for copies, and this machine's GPU or CPU elsewhere."
        ),
    )

    @property
    def places(self) -> bool:
        """True if ranks host copies of other ranks' experts; ValueError for a name unknown."""
        return self.placement != NO_PLACEMENT and bool(EXPERT_PLACEMENTS.get(self.placement).name)

    @property
    def copies_cluster(self) -> str:
        """The cluster by whose costs copies are placed: a shipped name or a file."""
        return COPIES_CLUSTER if self.cluster is None else self.cluster

    @property
    def slots(self) -> int:
        """Spare slots of a rank."""
        return 1 if self.replica_slots is None else self.replica_slots

    @property
    def drops(self) -> bool:
        """True if experts take tokens as they come, by a router of ours; ValueError for a name unknown."""
        return ROUTERS.get(self.router).choices is not None

    @property
    def mixes(self) -> bool:
        """True if a token's expert shares its output with an MLP; ValueError for a name unknown."""
        return ROUTERS.get(self.router).name == DEEPSPEED_MOE

    @property
    def exchange(self) -> ExpertExchange:
        """The exchange that is asked for; ValueError for a name unknown."""
        return EXCHANGES.get(self.comm_type)

    @property
    def two_hops(self) -> bool:
        """True if tokens travel inside nodes and then between them; ValueError for a name unknown."""
        return self.exchange.name == TWO_HOP

    @property
    def by_groups(self) -> bool:
        """True if rows go to one group of ranks after the other; ValueError for a name unknown."""
        return self.exchange.groups and self.pieces == 1

    @property
    def exchanges(self) -> bool:
        """True if tokens do not travel as Megatron's own dispatchers send them; ValueError for a name unknown."""
        return self.exchange.name != MEGATRONS_EXCHANGE or self.pieces != 1 or self.places or self.tunes

    @property
    def gathers(self) -> bool:
        """True if ranks that share each expert may gather its weights."""
        return self.gather not in (None, TOKENS)

    @property
    def tunes(self) -> bool:
        """True if layers gather weights, or choose how tokens travel in each step."""
        return self.gathers or self.degrees is not None

    @property
    def degree_list(self) -> tuple[int, ...]:
        """Numbers of pieces to choose from; none where none are given. ValueError for what is no list of numbers."""
        if self.degrees is None:
            return ()
        given = self.degrees.split(",")
        if not all(each.isdecimal() and int(each) for each in given):
            raise Refused(f"--moe-degrees needs numbers of pieces such as 1,2,4, got {self.degrees}")
        return tuple(check_pieces(int(each), "--moe-degrees") for each in given)

    @property
    def tries(self) -> int:
        """Steps that are measured with each choice."""
        return TRIES if self.tuning == STEPS else 0

    @property
    def exchange_node(self) -> int | None:
        """Ranks that an exchange takes for a node: one where it has one hop; None where it asks."""
        return self.ranks_per_node if self.two_hops else 1
