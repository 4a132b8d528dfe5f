"""Named axes over numbered ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from megatron_cp.errors import Refused

CONTEXT_AXES = ("inner", "outer")
"""The two axes of a context-parallel group, in the order of Megatron's --hierarchical-context-parallel-sizes."""


@dataclass(frozen=True, init=False, repr=False)
class Grid:
    """Ranks on a grid whose first axis varies fastest.

    Grid(4, 2) is the two axes of a context-parallel group: "inner" joins ranks 0 .. 3 and ranks 4 .. 7, "outer" ranks
    0 and 4, 1 and 5, ... Grid(2, 2, 3, names=("row", "column", "depth")) has three.
    """

    sizes: tuple[int, ...]
    names: tuple[str, ...]

    def __init__(self, *sizes: int, names: Sequence[str] = CONTEXT_AXES) -> None:
        if len(names) != len(sizes) or len({*names}) != len(names) or min(sizes, default=0) < 1:
            raise Refused(f"a grid has one positive size for each of its axes, got {sizes} for {tuple(names)}")
        object.__setattr__(self, "sizes", tuple(sizes))
        object.__setattr__(self, "names", tuple(names))

    def __repr__(self) -> str:
        return f"Grid({', '.join(f'{name}={size}' for name, size in zip(self.names, self.sizes, strict=True))})"

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return prod(self.sizes)

    def size(self, axis: str) -> int:
        """Return the number of ranks along an axis."""
        return self.sizes[self.names.index(axis)]

    def members(self, axis: str, rank: int) -> list[int]:
        """Return the ranks along `axis` through `rank`, in order."""
        place = self.names.index(axis)
        stride, size = prod(self.sizes[:place]), self.sizes[place]
        first = rank - rank // stride % size * stride
        return [first + step * stride for step in range(size)]

    @property
    def inner(self) -> int:
        """Size of the inner context-parallel axis."""
        return self.size("inner")

    @property
    def outer(self) -> int:
        """Size of the outer context-parallel axis."""
        return self.size("outer")


def most_square(ranks: int) -> Grid:
    """Return the most square context-parallel grid of so many ranks, with the larger axis inside."""
    outer = max(size for size in divisors(ranks) if size**2 <= ranks)
    return Grid(ranks // outer, outer)


def divisors(number: int) -> list[int]:
    """Return the sizes that divide `number`, ascending."""
    return [size for size in range(1, number + 1) if number % size == 0]


def team_sizes(ranks: int) -> list[int]:
    """Return the sizes of teams whose square divides the number of ranks."""
    return [size for size in range(1, ranks + 1) if ranks % size**2 == 0]
