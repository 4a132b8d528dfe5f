"""Rows of experts that are computed and not run: what a capacity drops, and how busy the busiest rank is. Pure."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from megatron_cp.errors import Refused


class Routing(NamedTuple):
    """How a router deals out tokens.

    factor: of an expert's capacity over an even share, as --moe-expert-capacity-factor; None where none is dropped
    group:  consecutive tokens that share out the capacity; None for all of a rank in a microbatch
    padded: inputs of experts are padded to the capacity
    skew:   exponent of Zipf's law that the loads of experts follow, busiest first; 0 for equal loads
    loads:  share of each expert in all choices, in order of the experts, in the place of `skew`; empty where not known
    """

    factor: float | None = None
    group: int | None = None
    padded: bool = False
    skew: float = 0.0
    loads: tuple[float, ...] = ()

    @property
    def uneven(self) -> bool:
        """True if loads of experts are given that differ."""
        return bool(self.skew or self.loads)

    def shares(self, experts: int) -> Sequence[float]:
        """Return the share of each expert in all choices; ValueError for loads of another number of experts."""
        if self.loads and len(self.loads) != experts:
            raise Refused(f"loads of {len(self.loads)} experts are given for {experts}; name a run with as many")
        return self.loads or loads_of(experts, self.skew)


EVEN = Routing()
"""Routing that drops none and loads all experts alike."""


class RoutedRows(NamedTuple):
    """Rows of experts for each token of a rank.

    mean:    that a rank sends, a mean over ranks
    busiest: that the busiest rank's experts see
    """

    mean: float
    busiest: float


def capacity_of(tokens: float, choices: int, experts: int, factor: float) -> int:
    """Return how many of a group's tokens, with so many choices each, an expert takes: `factor` times an even share."""
    return math.ceil(tokens * choices * factor / experts)


def loads_of(experts: int, skew: float) -> Sequence[float]:
    """Return the share of each expert in all choices, busiest first: 1 / rank^skew over their sum (Zipf's law)."""
    weights = [(rank + 1) ** -skew for rank in range(experts)]
    return [weight / sum(weights) for weight in weights]


def taken(choices: float, load: float, capacity: float) -> float:
    """Return how many of `choices` an expert takes on average, each of which is for it with probability `load`.

    E min(X, C) of a binomial X, with a normal one of its mean m and standard deviation s in its place, whose loss
    function is E max(0, X - C) = s phi(z) + (m - C) Phi(z), z = (m - C) / s.
    """
    mean = choices * load
    deviation = math.sqrt(mean * (1 - load))
    if not deviation:
        return min(mean, capacity)
    z = (mean - capacity) / deviation
    density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    above = (1 + math.erf(z / math.sqrt(2))) / 2
    return mean - deviation * density - (mean - capacity) * above


def rows_of(routing: Routing, tokens: float, choices: int, experts: int) -> tuple[float, ...]:
    """Return the rows of each expert for each token of a rank; arguments as `routed` has them."""
    loads = routing.shares(experts)
    if routing.factor is None:
        return tuple(choices * load for load in loads)
    size = routing.group or tokens
    capacity = capacity_of(size, choices, experts, routing.factor)
    return tuple((capacity if routing.padded else taken(size * choices, load, capacity)) / size for load in loads)


@lru_cache(256)
def routed(routing: Routing, tokens: float, choices: int, experts: int, ranks: int) -> RoutedRows:
    """Return the rows of experts that `ranks` ranks share in the order of the experts.

    tokens:  of a rank in a microbatch
    choices: experts that a token asks for, each choice on its own
    """
    if routing.factor is None and not routing.uneven:
        return RoutedRows(choices, choices)
    rows = rows_of(routing, tokens, choices, experts)
    mean = float(choices) if routing.factor is None else sum(rows)
    local = experts // ranks
    of_ranks = [sum(rows[first : first + local]) for first in range(0, experts, local)]
    return RoutedRows(mean, max(of_ranks) * ranks)
