"""Small problems for every backend of the registry, on every grid that it takes."""

from megatron_cp.context import BACKENDS
from megatron_cp.context.trace.events import Problem
from megatron_cp.context.trace.record import record
from megatron_cp.grid import Grid

MASKS = [(True, None), (False, None), (True, (9, 0)), (False, (7, 3))]


def grids(backend: str, ranks: int) -> list[Grid | None]:
    """Every grid for a backend that needs one; none, and every one that is not refused, for one that may have one."""
    entry = BACKENDS.get(backend)
    every = [Grid(n, ranks // n) for n in range(1, ranks + 1) if ranks % n == 0]
    if entry.needs_grid:
        return [*every]
    return [None, *(grid for grid in every if taken(backend, grid))] if entry.takes_grid else [None]


def taken(backend: str, grid: Grid) -> bool:
    ranks = grid.inner * grid.outer
    try:
        record(Problem(backend, ranks, 12 * ranks, ranks, ranks, grid=grid))
    except ValueError:
        return False
    return True
