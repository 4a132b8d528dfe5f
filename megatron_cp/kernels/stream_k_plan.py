"""How Stream-K cuts a matrix product among programs, and how full their waves are; pure, without Triton."""

from typing import NamedTuple


class StreamTiling(NamedTuple):
    """How the kernel is compiled.

    block: rows and columns of a tile, and inner elements of one step
    warps, stages: of a program, and of its loads ahead of products
    group: rows of tiles that are computed column by column
    """

    block: tuple[int, int, int]
    warps: int = 4
    stages: int = 3
    group: int = 8


HALF = StreamTiling((128, 256, 64), warps=8)
"""For two-byte elements: 144 KiB of loads ahead of the tensor cores, of the 227 of an H100's processor."""

SINGLE = StreamTiling((128, 128, 32), warps=8)
"""For float32, whose products are exact ones on the cores for float32."""


def tiling_of(element: int) -> StreamTiling:
    """Return how the kernel is compiled for elements of so many bytes."""
    return HALF if element == 2 else SINGLE


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


FULL_WAVES = 0.8
"""Speed of the kernel's full waves over that of torch's product, assumed until a GPU says otherwise."""

FIX_UP = 40
"""Steps as long as parts take to be written, read and added, assumed: on an H100 34 MB at 3 TB/s and a launch."""


class Prediction(NamedTuple):
    """Share of the processors' time in which they compute: by whole tiles in waves, and by Stream-K.

    waves: of whole tiles, the last one counted by the tiles that it has
    """

    waves: float
    by_tiles: float
    by_stream: float

    @property
    def pays(self) -> bool:
        """True if Stream-K takes less time, its fix-up and slower products counted."""
        return self.by_tiles < FULL_WAVES * self.by_stream


def predict(m: int, n: int, k: int, tiling: StreamTiling, processors: int) -> Prediction:
    """Predict the product of [m, k] and [k, n] on so many processors, whichever tiles torch's own product has."""
    plan = cut(m, n, k, tiling.block, processors)
    fix_up = FIX_UP if plan.shared else 0
    by_stream = plan.efficiency * plan.busiest / (plan.busiest + fix_up)
    return Prediction(plan.tiles / processors, wave_efficiency(m, n, tiling.block, processors), by_stream)
