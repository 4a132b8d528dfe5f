"""Named axes over the ranks of a context-parallel group."""

from typing import NamedTuple


class Grid(NamedTuple):
    """`inner` ranks next to each other, `outer` such groups: Megatron's --hierarchical-context-parallel-sizes.

    Axis "inner" joins ranks 0 .. inner - 1, axis "outer" joins ranks 0, inner, 2 * inner, ...
    """

    inner: int
    outer: int

    def members(self, axis: str, rank: int) -> list[int]:
        """The ranks of the group along `axis` that holds `rank`."""
        block, offset = divmod(rank, self.inner)
        if axis == "inner":
            return [block * self.inner + other for other in range(self.inner)]
        assert axis == "outer", axis
        return [other * self.inner + offset for other in range(self.outer)]


def most_square(ranks: int) -> Grid:
    """The most square grid of so many ranks, with the larger axis inside."""
    outer = max(size for size in divisors(ranks) if size**2 <= ranks)
    return Grid(ranks // outer, outer)


def divisors(number: int) -> list[int]:
    """The sizes that `number` can be divided into evenly, ascending."""
    return [size for size in range(1, number + 1) if number % size == 0]


def team_sizes(ranks: int) -> list[int]:
    """The sizes of teams whose square divides the number of ranks."""
    return [size for size in range(1, ranks + 1) if ranks % size**2 == 0]
