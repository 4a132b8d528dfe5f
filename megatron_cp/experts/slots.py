"""Slots: places for copies of experts beside their own ranks', and what a plan of them makes of the load.

A rank holds its own experts and hosts copies of others in its spare slots; weights travel there and gradients home with
every step, so that optimizer and checkpoints know nothing of them. Pure: plans depend on counts and costs alone, and
ranks that see the same ones make the same plan.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

type Counts = Sequence[Sequence[float]]
"""Rows of each rank for each expert, [ranks][experts]."""


class Slots(NamedTuple):
    """Experts of a layer, the ranks that share them in order, and the slots of a rank beside its own experts."""

    experts: int
    ranks: int
    spare: int

    def home(self, expert: int) -> int:
        """Return the rank that an expert is of."""
        return expert // (self.experts // self.ranks)


class SlotPlan(NamedTuple):
    """Where copies of experts are.

    hosted: for each rank, the experts of others that it hosts, in the order of their numbers
    """

    slots: Slots
    hosted: tuple[tuple[int, ...], ...]

    @classmethod
    def empty(cls, slots: Slots) -> "SlotPlan":
        """Return the plan without copies."""
        return cls(slots, ((),) * slots.ranks)

    @property
    def digest(self) -> str:
        """A short name, by which ranks compare their plans."""
        return hashlib.blake2b(repr(self).encode(), digest_size=8).hexdigest()

    @property
    def copies(self) -> int:
        """Copies on all ranks."""
        return sum(map(len, self.hosted))

    def hosts(self, expert: int) -> tuple[int, ...]:
        """Return the ranks that have an expert: its own, and those that host it."""
        others = (rank for rank, hosted in enumerate(self.hosted) if expert in hosted)
        return (self.slots.home(expert), *others)

    def with_copy(self, expert: int, rank: int) -> "SlotPlan":
        """Return the plan with one more copy."""
        return self._changed(rank, tuple(sorted((*self.hosted[rank], expert))))

    def without_copy(self, expert: int, rank: int) -> "SlotPlan":
        """Return the plan with one copy less."""
        return self._changed(rank, tuple(other for other in self.hosted[rank] if other != expert))

    def takes(self, expert: int, rank: int) -> bool:
        """Return True if a rank has a free slot and has the expert in none."""
        hosted = self.hosted[rank]
        return len(hosted) < self.slots.spare and expert not in hosted and self.slots.home(expert) != rank

    def _changed(self, rank: int, hosted: tuple[int, ...]) -> "SlotPlan":
        return self._replace(hosted=(*self.hosted[:rank], hosted, *self.hosted[rank + 1 :]))


class SlotCosts(NamedTuple):
    """Seconds, forward and backward.

    row:  of an expert for one row
    sent: of a row's way to another rank and back
    lent: of one copy: weights there, gradients home
    """

    row: float
    sent: float
    lent: float


class SlotLoad(NamedTuple):
    """Work of each rank for some experts.

    rows:              that it computes
    leaving, arriving: rows that it sends to others and gets from them
    lends, hosts:      copies of its own experts elsewhere, and of others' here
    """

    rows: tuple[float, ...]
    leaving: tuple[float, ...]
    arriving: tuple[float, ...]
    lends: tuple[int, ...]
    hosts: tuple[int, ...]

    @property
    def uneven(self) -> float:
        """Rows of the busiest rank over the mean; 1 is even."""
        return max(self.rows) * len(self.rows) / total if (total := sum(self.rows)) else 1.0

    def seconds(self, costs: SlotCosts) -> float:
        """Return the time of a layer in a step: its busiest rank, its busiest port, and the copies over a port."""
        travelling = max(max(self.leaving), max(self.arriving))
        copies = max(max(self.lends), max(self.hosts))
        return max(self.rows) * costs.row + travelling * costs.sent + copies * costs.lent

    def plus(self, other: "SlotLoad", sign: int = 1) -> "SlotLoad":
        """Return the sum, or the difference."""
        pairs = zip(self, other, strict=True)
        columns = (tuple(mine + sign * more for mine, more in zip(*pair, strict=True)) for pair in pairs)
        return SlotLoad(*columns)  # type: ignore[arg-type]


def load_of(plan: SlotPlan, counts: Counts) -> SlotLoad:
    """Return the load of all experts.

    A rank keeps the rows of an expert that it has, and deals out those of others among the ranks that have them.
    """
    parts = [expert_load(counts, expert, plan.hosts(expert)) for expert in range(plan.slots.experts)]
    total = parts[0]
    for part in parts[1:]:
        total = total.plus(part)
    return total


def expert_load(counts: Counts, expert: int, hosts: Sequence[int]) -> SlotLoad:
    """Return the load of one expert that these ranks have, the first of them its own."""
    ranks = range(len(counts))
    strangers = [0.0 if rank in hosts else counts[rank][expert] for rank in ranks]
    share = sum(strangers) / len(hosts)
    arriving = tuple(share if rank in hosts else 0.0 for rank in ranks)
    return SlotLoad(
        rows=tuple(arriving[rank] + (counts[rank][expert] if rank in hosts else 0.0) for rank in ranks),
        leaving=tuple(strangers),
        arriving=arriving,
        lends=tuple(len(hosts) - 1 if rank == hosts[0] else 0 for rank in ranks),
        hosts=tuple(int(rank in hosts[1:]) for rank in ranks),
    )


def lent_bytes(plan: SlotPlan, expert: int, microbatches: int) -> int:
    """Return the bytes that all copies of a layer take in a step: weights there once, gradients home each time.

    expert: bytes of an expert's parameters
    """
    return plan.copies * expert * (1 + microbatches)


def observed(past: Counts | None, counts: Counts, keep: float) -> Counts:
    """Return what a policy goes by: the counts of a step and, times `keep`, what it went by before.

    keep: 0 for the last step alone; below 1, so that the rest is the new step's share
    """
    if past is None or not keep:
        return counts
    return [
        [keep * before + (1 - keep) * now for before, now in zip(*both, strict=True)]
        for both in zip(past, counts, strict=True)
    ]
