"""The problem of a data-centric batch: documents, ranks, and the time that a group of ranks takes for documents.

The N data-parallel ranks of a pipeline stage are divided into groups anew for every microbatch, which is called a slot
here. A group of d ranks, its degree, runs the documents it is given as one microbatch under context parallelism of d.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from megatron_cp.errors import Refused


class GroupRate(NamedTuple):
    """Seconds of a group of one degree for a microbatch, forward and backward, on its slowest pipeline stage.

    fixed:    of a microbatch, whatever it holds
    token:    for each token, of work and copies that nothing hides
    square:   for the square of each document's length, of attention
    exchange: for each token, of transfers of keys and values that run beside attention
    """

    fixed: float
    token: float
    square: float
    exchange: float = 0.0

    def seconds(self, tokens: float, squares: float) -> float:
        """Return the seconds for documents of `tokens` in all, whose lengths' squares sum up to `squares`."""
        return self.fixed + self.token * tokens + max(self.square * squares, self.exchange * tokens)

    def least(self, length: int, kernels: float = 1.0) -> float:
        """Return a lower bound of what a document of `length` tokens adds to a group, in seconds.

        kernels: part of the attention's time that is taken from its kernels, the rest from transfers; without
                 transfers all is. A sum over the documents of a group is a bound if this is equal for all.
        """
        square = self.square * length * length
        if self.exchange:
            square = kernels * square + (1 - kernels) * self.exchange * length
        return self.token * length + square


@dataclass(frozen=True, kw_only=True)
class BatchProblem:
    """The documents of a step and the ranks that share them.

    lengths:  tokens of each document
    ranks:    data-parallel ranks of a pipeline stage
    capacity: most tokens of a rank in one slot
    rates:    of the groups that may be formed, by their degree
    per_node: ranks of a node; a group of at most so many stays inside one
    stages:   pipeline stages that a slot passes
    schedule: of the pipeline
    multiple: the number of slots is a multiple of it
    lockstep: every slot begins on all ranks at once, as collectives over all of them force it to
    after:    seconds of a step beside its slots
    """

    lengths: tuple[int, ...]
    ranks: int
    capacity: int
    rates: tuple[tuple[int, GroupRate], ...]
    per_node: int
    stages: int = 1
    schedule: str = "1f1b"
    multiple: int = 1
    lockstep: bool = False
    after: float = 0.0

    def __post_init__(self) -> None:
        for name in ("ranks", "capacity", "per_node", "stages", "multiple"):
            if getattr(self, name) < 1:
                raise Refused(f"{name.replace('_', ' ')} must be at least 1, got {getattr(self, name)}")
        if not self.lengths:
            raise Refused("a batch needs documents, got none; give at least one length")
        for at, length in enumerate(self.lengths):
            if length < 1:
                raise Refused(f"document {at} has {length} tokens; leave out documents without tokens")
        if not self.rates or any(not 1 <= degree <= self.ranks for degree in self.degrees):
            raise Refused(f"degrees of groups must lie between 1 and the {self.ranks} ranks, got {[*self.degrees]}")
        longest = max(self.lengths)
        if longest > self.degrees[-1] * self.capacity:
            raise Refused(
                f"document {self.lengths.index(longest)} of {longest:,} tokens is longer than the largest group holds, "
                f"{self.degrees[-1]} ranks of {self.capacity:,} tokens; raise --cp-tokens-per-rank, take more ranks or "
                f"cut documents with --seq-length"
            )

    @cached_property
    def degrees(self) -> tuple[int, ...]:
        """Degrees of groups that may be formed, in increasing order."""
        return tuple(sorted(degree for degree, _ in self.rates))

    @cached_property
    def rate(self) -> dict[int, GroupRate]:
        """Rate of each degree."""
        return dict(self.rates)

    @cached_property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return sum(self.lengths)

    @cached_property
    def longest_first(self) -> tuple[int, ...]:
        """Documents by decreasing length; of equal ones the first comes first."""
        return tuple(sorted(range(len(self.lengths)), key=lambda at: -self.lengths[at]))

    @cached_property
    def doubling(self) -> tuple[int, ...]:
        """Degrees that are powers of two, and one for longer documents than these hold."""
        powers = [degree for degree in self.degrees if _is_power(degree)]
        floor = self.floor(max(self.lengths))
        return tuple(powers) if powers and floor <= powers[-1] else (*powers, floor)

    @cached_property
    def aligned(self) -> bool:
        """True if groups have a place wherever their ranks are free: all degrees and nodes are powers of two."""
        return all(map(_is_power, (*self.degrees, self.per_node)))

    def floor(self, length: int) -> int:
        """Return the smallest degree whose ranks hold a document."""
        return next(degree for degree in self.degrees if degree * self.capacity >= length)

    def alone(self, length: int, degree: int) -> float:
        """Return the seconds of a group that holds this document alone."""
        return self.rate[degree].seconds(length, length * length)


def _is_power(number: int) -> bool:
    """True for a power of two."""
    return number & (number - 1) == 0
