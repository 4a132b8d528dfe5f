"""Copies of busy experts in a step: the plan of a policy, the load of ranks under it, and the copies that they send.

Assumed: tokens of all ranks choose alike, and the plan is the first one that the policy proposes for the load. Pure.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from megatron_cp.experts import NONE, PLACEMENTS
from megatron_cp.experts.dispatch_cost import SentBytes
from megatron_cp.experts.routed import RoutedRows
from megatron_cp.experts.slot_costs import COPIES_CLUSTER, slot_costs
from megatron_cp.experts.slots import SlotPlan, Slots, lent_bytes, load_of
from megatron_cp.hardware.cluster_file import load_cluster


class ExpertCopies(NamedTuple):
    """Copies of busy experts that a run asks for.

    policy:  a name in PLACEMENTS, as --moe-placement has it; "none" for no copies
    slots:   spare slots of a rank, as --moe-replica-slots says them
    cluster: by whose costs copies are placed, as --moe-cluster says it
    ahead:   layers before its own at which a layer's copies begin to travel, as --moe-copies-ahead: 0 or 1
    """

    policy: str = NONE
    slots: int = 1
    cluster: str = COPIES_CLUSTER
    ahead: int = 1

    @property
    def asked(self) -> bool:
        """True if a policy places copies; ValueError for a name unknown."""
        return self.policy != NONE and bool(PLACEMENTS.get(self.policy).name)


NO_COPIES = ExpertCopies()


class SharedExperts(NamedTuple):
    """A layer of experts that ranks share.

    hidden, ffn: of an expert's matrices, of which it has `linears`
    ranks:       of expert parallelism
    """

    hidden: int
    ffn: int
    linears: int
    ranks: int


class CopiedLoad(NamedTuple):
    """A layer's load under a plan of copies.

    rows:       of experts for each token of a rank, a mean and of the busiest rank
    travelling: rows on their way, likewise, with the share of an even load that stays: p / (p - 1) of those sent
    plan:       where copies are
    hosts:      copies on the rank that hosts most
    port:       copies that a rank lends or hosts, at most
    moved:      copies that a rank lends and hosts, at most
    """

    rows: RoutedRows
    travelling: RoutedRows
    plan: SlotPlan
    hosts: int
    port: int
    moved: int


@lru_cache(256)
def copied(
    copies: ExpertCopies, rows: tuple[float, ...], tokens: float, size: SharedExperts, microbatches: int
) -> CopiedLoad:
    """Return the load of ranks in a step of so many microbatches.

    rows:   of each expert, for each token of a rank
    tokens: of a rank in a microbatch
    Raises ValueError for a policy or a cluster unknown.
    """
    ranks, whole = size.ranks, microbatches * tokens
    counts = [[whole * each for each in rows]] * ranks
    empty = SlotPlan.empty(Slots(len(rows), ranks, copies.slots))
    costs = slot_costs(size.hidden, size.ffn, ranks, load_cluster(copies.cluster), microbatches, size.linears)
    plan = PLACEMENTS.get(copies.policy).load()(empty, counts, costs) if copies.asked else empty
    load = load_of(plan, counts)
    even = ranks / (ranks - 1) / whole
    return CopiedLoad(
        rows=RoutedRows(sum(load.rows) / ranks / whole, max(load.rows) / whole),
        travelling=RoutedRows(sum(load.leaving) / ranks * even, max(*load.leaving, *load.arriving) * even),
        plan=plan,
        hosts=max(load.hosts),
        port=max(*load.hosts, *load.lends),
        moved=max(host + lend for host, lend in zip(load.hosts, load.lends, strict=True)),
    )


def sent_bytes(plan: SlotPlan, expert: int, microbatches: int, nodes: Sequence[int]) -> SentBytes:
    """Return what a rank sends of a layer's copies in a step, a mean over the ranks that share it.

    expert: bytes of an expert's parameters on a rank
    nodes:  of each of these ranks
    """
    homes = ((plan.slots.home(expert), rank) for rank, hosted in enumerate(plan.hosted) for expert in hosted)
    near = sum(nodes[home] == nodes[rank] for home, rank in homes)
    each = lent_bytes(plan, expert, microbatches) / max(1, plan.copies) / plan.slots.ranks
    return SentBytes(each * near, each * (plan.copies - near))
