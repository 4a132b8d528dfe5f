"""A step with and without copies of busy experts, by each policy."""

from dataclasses import replace
from typing import Any, NamedTuple

from megatron_cp.experts import PLACEMENTS
from megatron_cp.experts.copies import NO_COPIES, ExpertCopies
from megatron_cp.planner.copies import copies_bytes, lent_times, sent_in_a_step
from megatron_cp.planner.estimate import Estimate, estimate
from megatron_cp.planner.stages import mean_layer, recomputed_layers, slowest_stage
from megatron_cp.planner.work import RankConfig, layer_kinds

MOST_COUNTS = 4096
"""Experts times ranks for which policies are weighed: each was seen to take less than a second for so many."""


class WeighedPlacement(NamedTuple):
    """A step with copies of experts.

    seconds: of the step
    uneven:  rows of the busiest rank over the mean, in the layers whose experts are loaded most unevenly
    copies:  bytes of weights on the rank that hosts most, of all layers of the fullest pipeline stage
    sent:    bytes of copies and of their gradients that a rank sends in a step, a mean over the ranks
    waited:  seconds in which a rank waits for them, in a step
    """

    asked: ExpertCopies
    seconds: float
    uneven: float
    copies: float
    sent: float
    waited: float

    def __str__(self) -> str:
        line = f"{self.asked.policy} {self.seconds:.4g} s a step (busiest rank {self.uneven:.2f} times the mean"
        if not self.sent:
            return f"{line})"
        lent = f"{self.copies / 1e9:.3g} GB of copies, {self.sent / 1e9:.3g} GB lent"
        return f"{line}, {lent}, waited for {self.waited:.3g} s)"

    def as_json(self) -> dict[str, Any]:
        """Return the figures by name."""
        return {"policy": self.asked.policy, "slots": self.asked.slots, **dict(list(self._asdict().items())[1:])}


def placements(found: Estimate) -> list[WeighedPlacement]:
    """Return no copies and each policy's, fastest first, with as many slots as the run has or `spare_of` says."""
    asked = found.parallel.expert_copies
    slots = asked.slots if asked.asked else spare_of(found.rank)
    each = [NO_COPIES, *(asked._replace(policy=name, slots=slots) for name in PLACEMENTS.names)]
    return sorted((_weighed(found, copies) for copies in each), key=lambda one: one.seconds)


def placed(found: Estimate) -> WeighedPlacement:
    """Return the copies that a run asks for."""
    return _weighed(found, found.parallel.expert_copies)


def spare_of(rank: RankConfig) -> int:
    """Return one spare slot for two of a rank's experts, at least one."""
    return max(1, rank.model.experts // rank.parallel.ep // 2)


def placement_why(found: Estimate) -> str:
    """Return one line on a step with and without copies of experts; empty where they are too many to weigh."""
    model, parallel, asked = found.model, found.parallel, found.parallel.expert_copies
    if parallel.ep == 1:
        return "placement of copies: none, since no rank lacks an expert"
    if not asked.asked:
        if not model.routing.uneven:
            return "placement of copies: none, since equal loads are assumed (--skew, --expert-loads)"
        if model.routing.factor is not None:
            return "placement of copies: none, since a capacity drops what makes experts busy"
        if model.experts * parallel.ep > MOST_COUNTS:
            return ""
    first, *others = placements(found)
    flags = f"--moe-placement {first.asked.policy} --moe-replica-slots {first.asked.slots}"
    faster = f"; {flags}, with --transformer-impl local" if first.asked.asked and not asked.asked else ""
    trained = f" with {asked.policy}" if asked.asked else ""
    return f"placement of copies{trained}: {', '.join(map(str, [first, *others]))}{faster}"


def _weighed(found: Estimate, copies: ExpertCopies) -> WeighedPlacement:
    parallel = replace(found.parallel, expert_copies=copies)
    rank = replace(found.rank, parallel=parallel)
    # both without traces of context parallelism, which copies do not change
    without_traces = (estimate(one.model, one.parallel, one.cluster, one.seq).seconds for one in (rank, found.rank))
    with_copies, as_found = without_traces
    layers, chunks = slowest_stage(rank).layers, parallel.vp * parallel.copies
    of_chunk = layers / chunks
    waited = lent_times(rank, mean_layer(rank), of_chunk, recomputed_layers(rank, of_chunk))
    return WeighedPlacement(
        asked=copies,
        seconds=found.seconds + with_copies - as_found,
        uneven=max(kind.rank.routed.busiest / kind.rank.routed.mean for kind in layer_kinds(rank) if kind.moe),
        copies=copies_bytes(rank, layers)[0],
        sent=layers * sum(sent_in_a_step(rank)),
        waited=chunks * parallel.micros * sum(part.total for part in waited),
    )
