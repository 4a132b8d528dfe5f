"""Decide the grid and the engine of a tensor-parallel group from what a user asks for."""

from collections.abc import Sequence
from typing import NamedTuple

from megatron_cp.errors import Refused
from megatron_cp.grid import Grid, divisors, most_square
from megatron_cp.tensor import DEFAULT_ENGINE, ENGINES, PANELS, SCHEMES, TensorScheme
from megatron_cp.units import is_whole

AUTO_ENGINE = "auto"

CUBES = (8, 27, 64)
"""Ranks of a tensor-parallel group that make a cube."""


class GridSize(NamedTuple):
    """Ranks over which tokens and weights are gathered."""

    tokens: int
    weights: int

    def __str__(self) -> str:
        return f"{self.tokens} x {self.weights}"

    @property
    def grid(self) -> Grid:
        """The two axes; neighbours share the tokens and gather weights."""
        return Grid(self.weights, self.tokens, names=("weights", "tokens"))


def grid_of(scheme: TensorScheme, ranks: int, asked: Sequence[str] | None) -> GridSize:
    """Return the grid of so many ranks under a scheme, as --tp-grid asks for it; raises ValueError where it cannot be.

    Without a request it is the most square grid, with the larger axis for tokens; a scheme without grid has its ranks
    on the token axis.
    """
    possible = ", ".join(f"{ranks // weights} {weights}" for weights in divisors(ranks))
    if not scheme.grid:
        if asked:
            raise Refused(
                f"--tp-grid {' '.join(asked)} needs --tp-comm-type "
                f"{' or '.join(entry.name for entry in SCHEMES if entry.grid)}, got {scheme.name}; leave it out"
            )
        return GridSize(ranks, 1)
    if not asked:
        square = most_square(ranks)
        if square.outer == 1:
            raise Refused(
                f"--tp-comm-type {scheme.name} has no grid with two axes of --tensor-model-parallel-size {ranks}; "
                f"pass --tp-grid 1 {ranks} to gather weights alone, or use flux"
            )
        return GridSize(square.inner, square.outer)
    if len(asked) != 2 or not all(is_whole(size) for size in asked) or int(asked[0]) * int(asked[1]) != ranks:
        raise Refused(
            f"--tp-grid takes TOKENS WEIGHTS whose product is --tensor-model-parallel-size {ranks}, got "
            f"{' '.join(asked)}; possible are {possible}"
        )
    return GridSize(int(asked[0]), int(asked[1]))


def cube_side(ranks: int) -> int:
    """Return the side of a cube of so many ranks; raises ValueError where they make none."""
    if ranks not in CUBES:
        raise Refused(
            f"--tp-comm-type 3d needs a --tensor-model-parallel-size of 8, 27 or 64, got {ranks}; use one of them"
        )
    return round(ranks ** (1 / 3))


def engine_of(asked: str) -> str:
    """Return the name of the engine that --tp-engine asks for."""
    return DEFAULT_ENGINE if asked == AUTO_ENGINE else ENGINES.get(asked).name


def check_engine(engine: str, scheme: TensorScheme, size: GridSize) -> None:
    """Raise ValueError for an engine of gathered weights on a grid that gathers none."""
    if engine == PANELS and size.weights == 1:
        raise Refused(
            f"--tp-engine {PANELS} takes weights of a grid apart, got --tp-comm-type {scheme.name}, where no weight is "
            f"gathered on {size} ranks; use {DEFAULT_ENGINE}, or 2d with a --tp-grid that gathers weights"
        )
