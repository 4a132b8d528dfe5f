"""Which kernel calls compute the unmasked pairs of a rank's queries with a block of keys.

Local tokens stand in sequence order, so a causal mask lets query i see a prefix of the keys, and the prefix never gets
shorter with i: a staircase. Where it grows by one key per query the pairs form a rectangle and a square causal
triangle; where it stays, a rectangle. Causal tiles are always square, so that kernels which align causal masks top-left
and kernels which align them bottom-right do the same.
"""

from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import NamedTuple

from megatron_cp.context.layouts import Runs, length, located


class Tile(NamedTuple):
    """One kernel call: local queries, local keys, and whether the mask is causal (square, aligned) or full."""

    q: slice
    kv: slice
    causal: bool

    @property
    def pairs(self) -> int:
        """Unmasked query-key pairs."""
        queries, keys = self.q.stop - self.q.start, self.kv.stop - self.kv.start
        return queries * (queries + 1) // 2 if self.causal else queries * keys


class Step(NamedTuple):
    """Queries [start, stop): the first sees `seen` keys, each further one `slope` (0 or 1) more."""

    start: int
    stop: int
    seen: int
    slope: int


@cache
def tiles(q_runs: Runs, kv_runs: Runs, causal: bool) -> tuple[Tile, ...]:
    """Tiles that cover every unmasked pair of `q_runs` with `kv_runs` exactly once."""
    if not causal:
        return (Tile(slice(0, length(q_runs)), slice(0, length(kv_runs)), False),)
    return tuple(tile for step in _staircase(q_runs, kv_runs) for tile in _cover(step))


@cache
def seen(q_runs: Runs, kv_runs: Runs, causal: bool) -> int:
    """How many of the leading keys any of the queries sees; the others need not travel to them."""
    return max((tile.kv.stop for tile in tiles(q_runs, kv_runs, causal)), default=0)


def _cover(step: Step) -> Iterator[Tile]:
    rows = slice(step.start, step.stop)
    full = step.seen - step.slope
    if full > 0:
        yield Tile(rows, slice(0, full), False)
    if step.slope:
        yield Tile(rows, slice(full, full + step.stop - step.start), True)


def _staircase(q_runs: Runs, kv_runs: Runs) -> list[Step]:
    """The steps over all queries, those that see nothing left out, neighbours that continue each other joined."""
    joined: list[Step] = []
    for run, local in located(q_runs):
        for step in _steps(run, kv_runs):
            shifted = step._replace(start=step.start + local.start, stop=step.stop + local.start)
            if joined and _continues(joined[-1], shifted):
                shifted = joined.pop()._replace(stop=shifted.stop)
            joined.append(shifted)
    return [step for step in joined if step.seen or step.slope]


def _continues(left: Step, right: Step) -> bool:
    due = left.seen + left.slope * (left.stop - left.start)
    return left.stop == right.start and left.slope == right.slope and due == right.seen


def _steps(run: range, kv_runs: Runs) -> Iterator[Step]:
    """The staircase of one run of queries: each run of keys is a ramp that adds one key per query."""
    ramps = [_ramp(run, keys) for keys in kv_runs]
    bounds = {0, len(run)} | {bound for ramp in ramps for bound in (ramp.start, ramp.stop) if 0 < bound < len(run)}
    edges = sorted(bounds)
    for start, stop in pairwise(edges):
        count = sum(min(max(start - ramp.start + 1, 0), len(ramp)) for ramp in ramps)
        slope = sum(start in ramp for ramp in ramps)
        assert slope <= 1, "key runs overlap or are out of order"
        yield Step(start, stop, count, slope)


def _ramp(run: range, keys: range) -> range:
    """Indices of queries at which one more of `keys` becomes visible."""
    if len(run) > 1 and len(keys) > 1 and run.step != keys.step:
        raise ValueError(f"runs with steps {run.step} and {keys.step} make no staircase; use one layout for all ranks")
    step = run.step if len(run) > 1 else keys.step
    first = -(-(keys.start - run.start) // step)
    return range(first, first + len(keys))
