"""Tiles: the kernel calls that compute the unmasked pairs of a rank's queries with a block of keys.

Local tokens stand in sequence order, so query i sees a stretch of the keys, and neither end of the stretch moves back
as i grows: the pairs lie between two staircases, whose steps rise by at most one key per query. Cut into stretches of
queries over which neither staircase changes its slope, they are a triangle against the lower staircase, a rectangle,
and a triangle against the upper one. Triangles are square, so that kernels which align causal masks top-left and
kernels which align them bottom-right do the same. Steps that start at the same key are halved together around the
largest rectangle under their middle, and so on: as many tiles as steps, but squares, where one tile for each step would
be a flat band, which kernels are slower at.

A kernel that takes windows computes a whole band along the diagonal at once: neighbouring steps whose staircases are
the two edges of a band are one tile, however narrow the band.

A mask with pieces is one band in each of them: the runs are clipped to a piece, whose local tokens are a stretch too.
"""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator
from itertools import accumulate, groupby, pairwise
from typing import Literal, NamedTuple

from megatron_cp.context import cache_sizes
from megatron_cp.context.layouts import Runs, length, located
from megatron_cp.context.masks import CAUSAL, FULL, AnyMask, Mask, Piece, Pieces
from megatron_cp.context.remembered import remembered
from megatron_cp.errors import Refused

Shape = Literal["full", "lower", "upper"] | Mask


class Tile(NamedTuple):
    """One kernel call: local queries, local keys, and which of the pairs are unmasked.

    "full": all. "lower": the i-th query sees the first i + 1 keys (causal). "upper": it sees the i-th and all after.
    A mask: those that it leaves where the last query has the last key's position, for kernels that take windows.
    """

    q: slice
    kv: slice
    shape: Shape

    @property
    def pairs(self) -> int:
        """Unmasked query-key pairs."""
        queries, keys = self.q.stop - self.q.start, self.kv.stop - self.kv.start
        if isinstance(self.shape, Mask):
            return self.shape.pairs(queries, keys)
        return queries * keys if self.shape == "full" else queries * (queries + 1) // 2


class StaircaseStep(NamedTuple):
    """Queries [start, stop): the first sees keys [low, high), each further one starts `low_slope` later and so on."""

    start: int
    stop: int
    low: int
    low_slope: int
    high: int
    high_slope: int

    @property
    def queries(self) -> int:
        return self.stop - self.start

    @property
    def last_high(self) -> int:
        """Keys that the last query has reached."""
        return self.high + (self.queries - 1) * self.high_slope

    def skip(self, queries: int) -> "StaircaseStep":
        """Return the rest of the step after its first queries."""
        low, high = self.low + queries * self.low_slope, self.high + queries * self.high_slope
        return self._replace(start=self.start + queries, low=low, high=high)


@remembered(cache_sizes.PAIRS)
def tiles(q_runs: Runs, kv_runs: Runs, mask: AnyMask, *, windows: bool = False) -> tuple[Tile, ...]:
    """Tiles that cover every unmasked pair of `q_runs` with `kv_runs` exactly once.

    windows: the kernel takes windows; a mask without one is cut alike for all kernels
    """
    if isinstance(mask, Mask):
        return tuple(_band_tiles(q_runs, kv_runs, mask, windows))
    return tuple(
        Tile(_moved(tile.q, clip.rows), _moved(tile.kv, clip.cols), tile.shape)
        for clip in clips(q_runs, kv_runs, mask)
        for tile in _band_tiles(clip.queries, clip.keys, clip.piece.band, windows)
    )


@remembered(cache_sizes.PAIRS)
def seen(q_runs: Runs, kv_runs: Runs, mask: AnyMask) -> slice:
    """Return the stretch of keys that any of the queries sees; no other key need be sent to them."""
    if isinstance(mask, Mask):
        return _seen_in_band(q_runs, kv_runs, mask)
    return hull(
        tuple(
            _moved(_seen_in_band(clip.queries, clip.keys, clip.piece.band), clip.cols)
            for clip in clips(q_runs, kv_runs, mask)
        )
    )


@remembered(cache_sizes.PAIRS)
def wanted(q_runs: Runs, kv_runs: Runs, mask: AnyMask) -> tuple[slice, ...]:
    """Return the stretches of keys that some of the queries see, in their order; `seen` is the one that holds them."""
    if isinstance(mask, Mask):
        stretch = seen(q_runs, kv_runs, mask)
        return (stretch,) if stretch.start < stretch.stop else ()
    found = sorted(
        (stretch.start + clip.cols, stretch.stop + clip.cols)
        for clip in clips(q_runs, kv_runs, mask)
        for run in clip.queries
        if (stretch := _seen_in_band((run,), clip.keys, clip.piece.band)).start < stretch.stop
    )
    joined: list[slice] = []
    for start, stop in found:
        if joined and start <= joined[-1].stop:
            joined[-1] = slice(joined[-1].start, max(stop, joined[-1].stop))
        else:
            joined.append(slice(start, stop))
    return tuple(joined)


def hull(stretches: tuple[slice, ...]) -> slice:
    """Return the shortest stretch that holds all non-empty ones."""
    stretches = tuple(stretch for stretch in stretches if stretch.start < stretch.stop)
    if not stretches:
        return slice(0, 0)
    return slice(min(stretch.start for stretch in stretches), max(stretch.stop for stretch in stretches))


class Clip(NamedTuple):
    """The queries and keys inside a piece, and the number of local tokens before them."""

    piece: Piece
    rows: int
    queries: Runs
    cols: int
    keys: Runs

    @property
    def local(self) -> tuple[slice, slice]:
        """The local queries and keys."""
        return slice(self.rows, self.rows + length(self.queries)), slice(self.cols, self.cols + length(self.keys))


def clips(q_runs: Runs, kv_runs: Runs, mask: Pieces) -> Iterator[Clip]:
    """Yield each piece in which there are queries and keys, with these."""
    found: dict[int, list[tuple[range, int]]] = defaultdict(list)
    for run, local in located(q_runs):
        for index, piece in mask.of(run):
            skipped, inside = _clipped(run, piece.q)
            if inside:
                found[index].append((inside, local.start + skipped))
    starts, before = [run[0] for run in kv_runs], list(accumulate(map(len, kv_runs), initial=0))
    for index in sorted(found):
        piece, keys, cols = mask.all[index], list[range](), 0
        # from the last run that starts before the piece, on to the first that starts behind it
        first = max(0, bisect_right(starts, piece.kv.start) - 1)
        for number in range(first, bisect_left(starts, piece.kv.stop)):
            skipped, inside = _clipped(kv_runs[number], piece.kv)
            if inside:
                cols = cols if keys else before[number] + skipped
                keys.append(inside)
        if keys:
            yield Clip(piece, found[index][0][1], tuple(run for run, _ in found[index]), cols, tuple(keys))


def _clipped(run: range, stretch: range) -> tuple[int, range]:
    """Return how many positions of the run lie before the stretch, and those inside it."""
    if stretch.start <= run.start and run.stop <= stretch.stop:
        return 0, run
    skipped = max(0, -(-(stretch.start - run.start) // run.step))
    return skipped, run[skipped : max(skipped, -(-(stretch.stop - run.start) // run.step))]


def _moved(stretch: slice, by: int) -> slice:
    return slice(stretch.start + by, stretch.stop + by)


def _band_tiles(q_runs: Runs, kv_runs: Runs, band: Mask, windows: bool) -> Iterator[Tile]:
    steps = _steps(q_runs, kv_runs, band)
    if windows and band.window:
        yield from (_band(part) for joined in _bands(steps) for part in _no_wider_than_long(joined))
    else:
        groups = groupby(steps, key=lambda step: (step.low, step.low_slope))
        yield from (tile for _, same in groups for tile in _halve(list(same)))


def _seen_in_band(q_runs: Runs, kv_runs: Runs, band: Mask) -> slice:
    # stretches of neighbouring positions, without a window: the last query sees most
    if len(q_runs) == len(kv_runs) == 1 and band.left is None and q_runs[0].step == kv_runs[0].step == 1:
        (queries,), (keys,) = q_runs, kv_runs
        high = len(keys) if band.right is None else queries[-1] + band.right + 1 - keys.start
        return slice(0, min(max(high, 0), len(keys)))
    return hull(tuple(slice(step.low, step.last_high) for step in _steps(q_runs, kv_runs, band)))


def _bands(steps: list[StaircaseStep]) -> list[list[StaircaseStep]]:
    """Group steps that follow each other without a gap, are cut off left before they climb and right after it."""
    bands: list[list[StaircaseStep]] = []
    for step in map(_seeing, steps):
        if step.queries <= 0:
            continue
        before = bands[-1][-1] if bands else None
        if before and _continues(before, step):
            bands[-1].append(step)
        else:
            bands.append([step])
    return bands


def _no_wider_than_long(steps: list[StaircaseStep]) -> list[list[StaircaseStep]]:
    """Cut a band of more queries than keys where its edges start and stop to climb: each part has as many keys."""
    # flash-attn takes a right limit of as many as all keys for none
    if steps[-1].stop - steps[0].start <= steps[-1].last_high - steps[0].low:
        return [steps]
    parts = groupby(steps, key=lambda step: "upper" if step.high_slope else "lower" if step.low_slope else "full")
    return [list(part) for _, part in parts]


def _seeing(step: StaircaseStep) -> StaircaseStep:
    """Return the step without a first or a last query that sees nothing, as others of its queries do."""
    step = step if step.high > step.low else step.skip(1)
    last_low = step.low + (step.queries - 1) * step.low_slope
    return step if step.last_high > last_low else step._replace(stop=step.stop - 1)


def _continues(before: StaircaseStep, step: StaircaseStep) -> bool:
    """True if both lie in one band: its left edge climbs from some query on, its right edge up to some query."""
    here = before.skip(before.queries)
    starts, ends = step.low_slope - before.low_slope, before.high_slope - step.high_slope
    # where a slope changes, the edge may cross from one key to the next between the two queries
    return (
        here.start == step.start
        and min(starts, ends) >= 0
        and 0 <= step.low - here.low <= starts
        and 0 <= here.high - step.high <= ends
    )


def _band(steps: list[StaircaseStep]) -> Tile:
    """Return the one tile of such steps: the smallest that holds them, under the mask that cuts off its corners."""
    rows, cols = slice(steps[0].start, steps[-1].stop), slice(steps[0].low, steps[-1].last_high)
    # the key at which a query's band would start or end if it climbed over all rows, with the last key at the last row
    low = next((step.low - step.start for step in steps if step.low_slope), None)
    high = next((step.high - 1 - step.start for step in steps if step.high_slope), None)
    corner = cols.stop - rows.stop
    mask = Mask(None if low is None else corner - low, None if high is None else high - corner)
    if mask == FULL:
        return Tile(rows, cols, "full")
    square = rows.stop - rows.start == cols.stop - cols.start
    return Tile(rows, cols, "lower" if mask == CAUSAL and square else mask)


def _halve(steps: list[StaircaseStep]) -> Iterator[Tile]:
    """Tiles of steps that start at the same key."""
    if len(steps) <= 1:
        for step in steps:
            yield from _cover(step)
        return
    lower, upper = steps[: len(steps) // 2], steps[len(steps) // 2 :]
    top = upper[0].high - upper[0].high_slope
    yield from _halve(lower)
    if upper[0].low < top:
        yield Tile(slice(upper[0].start, upper[-1].stop), slice(upper[0].low, top), "full")
    yield from _halve([step._replace(low=top) for step in upper if step.high > top or step.high_slope])


def _cover(step: StaircaseStep) -> Iterator[Tile]:
    while step.queries:
        keys = step.high - step.low
        if not keys:
            # at most the first query sees nothing: those of a whole step were left out
            queries = 1
        elif step.low_slope:
            # where the triangles would meet, in a band narrower than the stretch, go along it in squares
            queries = min(step.queries, max(1, keys - step.high_slope))
            yield from _slab(step, queries)
        else:
            queries = step.queries
            yield from _slab(step, queries)
        step = step.skip(queries)


def _slab(step: StaircaseStep, queries: int) -> Iterator[Tile]:
    rows = slice(step.start, step.start + queries)
    first, last = step.low + queries * step.low_slope, step.high - step.high_slope
    if queries == 1:
        first, last = step.low, step.high
    elif step.low_slope:
        yield Tile(rows, slice(step.low, first), "upper")
    if first < last:
        yield Tile(rows, slice(first, last), "full")
    if queries > 1 and step.high_slope:
        yield Tile(rows, slice(last, last + queries), "lower")


def _steps(q_runs: Runs, kv_runs: Runs, mask: Mask) -> list[StaircaseStep]:
    """Return the steps over all queries, joined where they continue each other, without those that see nothing."""
    joined: list[StaircaseStep] = []
    for run, local in located(q_runs):
        for step in _run_steps(run, kv_runs, mask):
            shifted = step._replace(start=step.start + local.start, stop=step.stop + local.start)
            if joined and joined[-1].skip(joined[-1].queries) == shifted._replace(stop=shifted.start):
                shifted = joined.pop()._replace(stop=shifted.stop)
            joined.append(shifted)
    return [step for step in joined if step.high > step.low or step.high_slope > step.low_slope]


def _run_steps(run: range, kv_runs: Runs, mask: Mask) -> Iterator[StaircaseStep]:
    """Yield the steps of one run of queries: each run of keys is a ramp of one key per query in either staircase."""
    # a query has passed the keys more than `left` before it and reached those up to `right` after it
    # a ramp is the queries over which a staircase climbs one run of keys
    lows = [] if mask.left is None else [_ramp(run, keys, -mask.left - 1) for keys in kv_runs]
    highs = [] if mask.right is None else [_ramp(run, keys, mask.right) for keys in kv_runs]
    # between two neighbouring ends of ramps neither staircase changes its slope
    edges = {edge for ramp in (*lows, *highs) for edge in (ramp.start, ramp.stop) if 0 < edge < len(run)}
    for start, stop in pairwise(sorted({0, *edges, len(run)})):
        low, low_slope = _height(lows, start)
        high, high_slope = _height(highs, start) if mask.right is not None else (length(kv_runs), 0)
        yield StaircaseStep(start, stop, low, low_slope, high, high_slope)


def _height(ramps: list[range], query: int) -> tuple[int, int]:
    """Return how many keys this query has reached, and 1 if the next query reaches one more, else 0."""
    count = sum(min(max(query - ramp.start + 1, 0), len(ramp)) for ramp in ramps)
    slope = sum(query in ramp for ramp in ramps)
    assert slope <= 1, "key runs overlap or are out of order"
    return count, slope


def _ramp(run: range, keys: range, shift: int) -> range:
    """Indices of queries at which one more of `keys` lies at or before the query's position plus `shift`."""
    if len(run) > 1 and len(keys) > 1 and run.step != keys.step:
        raise Refused(f"runs with steps {run.step} and {keys.step} make no staircase; use one layout for all ranks")
    step = run.step if len(run) > 1 else keys.step
    first = -(-(keys.start - shift - run.start) // step)
    return range(first, first + len(keys))
