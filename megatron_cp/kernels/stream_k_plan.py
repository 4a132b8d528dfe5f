"""How Stream-K cuts a matrix product among programs, and how full their waves are; pure, without Triton."""

from typing import NamedTuple

BLOCK = (128, 128, 32)
"""Rows and columns of a tile, and inner elements of one step."""


class StreamPlan(NamedTuple):
    """The work of a product on `programs` programs.

    rows, columns: tiles of the output in each dimension
    inner: steps of one tile
    whole: tiles that one program each computes alone
    share: steps of a program in the other tiles
    """

    rows: int
    columns: int
    inner: int
    whole: int
    share: int
    programs: int

    @property
    def tiles(self) -> int:
        """Tiles of the output."""
        return self.rows * self.columns

    @property
    def shared(self) -> int:
        """Tiles whose steps are dealt out."""
        return self.tiles - self.whole

    @property
    def most_parts(self) -> int:
        """Tiles that a share of steps touches at most."""
        return 1 + -(-self.share // self.inner)

    @property
    def busiest(self) -> int:
        """Steps of the program with most work."""
        return self.whole // self.programs * self.inner + self.share

    @property
    def efficiency(self) -> float:
        """Share of the programs' time in which they compute, if a step takes equally long everywhere."""
        return self.tiles * self.inner / (self.programs * self.busiest)


def cut(m: int, n: int, k: int, block: tuple[int, int, int], programs: int) -> StreamPlan:
    """Cut the product of [m, k] and [k, n] among programs.

    The last whole wave of tiles is dealt out too, where there is one: its steps and those of the rest are then long
    enough for each program (Osama et al. 2023, 5.2). Without a rest every tile has a program of its own.
    """
    rows, columns, inner = (-(-size // tile) for size, tile in zip((m, n, k), block, strict=True))
    tiles = rows * columns
    waves, rest = divmod(tiles, programs)
    whole = max(0, waves - 1) * programs if rest else tiles
    return StreamPlan(rows, columns, inner, whole, -(-(tiles - whole) * inner // programs), programs)


def wave_efficiency(m: int, n: int, block: tuple[int, int, int], programs: int) -> float:
    """Return the same share for one tile per program and wave: t / (g ceil(t / g)), of t tiles on g programs."""
    tiles = -(-m // block[0]) * -(-n // block[1])
    return tiles / (programs * -(-tiles // programs))
