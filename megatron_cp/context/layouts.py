"""Layouts: the token positions that each rank owns.

A run is a Python `range` of positions; a rank's runs are listed in the order of its local tokens; a layout is one tuple
of runs per rank. Ring, zigzag and striped attention differ in nothing else.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from megatron_cp.context import cache_sizes
from megatron_cp.context.remembered import Keeper, remembered
from megatron_cp.errors import Refused
from megatron_cp.registry import unknown

ZIGZAG, CONTIGUOUS, STRIPED = "zigzag", "contiguous", "striped"

Runs = tuple[range, ...]
Layout = tuple[Runs, ...]


class PlannedLayout(Layout, Keeper):
    """A layout for the documents of one microbatch.

    It keeps its hash, and what `remembered` functions return for it: all layers share these results, and they go when
    the microbatch does.
    """

    def __new__(cls, layout: Layout) -> "PlannedLayout":
        made = super().__new__(cls, layout)
        made.results = {}
        return made

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return super().__hash__()

    def __reduce__(self) -> tuple[Any, ...]:
        return PlannedLayout, (tuple(self),)


def contiguous(tokens: int, ranks: int) -> Layout:
    """Rank r owns the r-th of `ranks` equal pieces (Ring Attention, arXiv:2310.01889)."""
    size = _divide(tokens, ranks, CONTIGUOUS, "context_parallel_size")
    return tuple((range(rank * size, (rank + 1) * size),) for rank in range(ranks))


def zigzag(tokens: int, ranks: int) -> Layout:
    """Rank r owns chunks r and 2 * ranks - 1 - r of 2 * ranks: Megatron's layout, balanced under a causal mask."""
    size = _divide(tokens, 2 * ranks, ZIGZAG, "2 * context_parallel_size")
    chunks = [range(start, start + size) for start in range(0, tokens, size)]
    return tuple(join((chunks[rank], chunks[2 * ranks - 1 - rank])) for rank in range(ranks))


def striped(tokens: int, ranks: int, stripe: int = 1) -> Layout:
    """Rank r owns every `ranks`-th block of `stripe` positions from the r-th on (Striped Attention, arXiv:2311.09431).

    The paper's blocks are single tokens: one triangle per hop, where the longer ones make many small tiles, but are
    stretches that can be gathered.
    """
    if stripe == 1:
        _divide(tokens, ranks, STRIPED, "context_parallel_size")
        return tuple((normal(range(rank, tokens, ranks)),) for rank in range(ranks))
    step = ranks * stripe
    _divide(tokens, step, STRIPED, "context_parallel_size * stripe")
    return tuple(
        join([range(start, start + stripe) for start in range(rank * stripe, tokens, step)]) for rank in range(ranks)
    )


LAYOUTS: dict[str, Callable[[int, int], Layout]] = {ZIGZAG: zigzag, CONTIGUOUS: contiguous, STRIPED: striped}


@lru_cache(cache_sizes.LAYOUTS)
def layout(name: str, tokens: int, ranks: int, stripe: int = 1) -> Layout:
    """Return the layout called `name` of a sequence of `tokens`; `stripe` is the length of a block of "striped".

    Raises ValueError for an unknown name and when the length does not fit.
    """
    if name not in LAYOUTS:
        raise unknown("layout", name, LAYOUTS)
    return striped(tokens, ranks, stripe) if name == STRIPED else LAYOUTS[name](tokens, ranks)


def indices(name: str, tokens: int, ranks: int, rank: int, stripe: int = 1) -> list[int]:
    """Return the positions of `rank`'s tokens, in local order."""
    return [position for run in layout(name, tokens, ranks, stripe)[rank] for position in run]


def normal(run: range) -> range:
    """Return the run with step 1 if it has one position: such ranges are equal, also as keys of caches, at any step."""
    return range(run[0], run[0] + 1) if len(run) == 1 else run


def join(runs: Sequence[range]) -> Runs:
    """Join neighbouring runs and drop empty ones; positions and order stay."""
    joined: list[range] = []
    for run in map(normal, runs):
        if joined and len(run) and run.start == joined[-1].stop and run.step == joined[-1].step == 1:
            joined[-1] = range(joined[-1].start, run.stop)
        elif len(run):
            joined.append(run)
    return tuple(joined)


def length(runs: Runs) -> int:
    """Return how many positions the runs hold."""
    return sum(map(len, runs))


@remembered(cache_sizes.GROUPS)
def of_ranks(layout: Layout, ranks: tuple[int, ...]) -> Layout:
    """Return the part of a layout that these ranks own."""
    part = tuple(layout[rank] for rank in ranks)
    return PlannedLayout(part) if isinstance(layout, PlannedLayout) else part


class Place(NamedTuple):
    """A stretch of one rank's local tokens and where it stands in the gathered sequence."""

    rank: int
    local: slice
    whole: slice


@remembered(cache_sizes.GROUPS)
def gathered(members: Layout) -> tuple[Runs, tuple[Place, ...]]:
    """Return the runs of several ranks together, in sequence order, and the place of each member's stretches in them.

    Raises ValueError when the members' runs interleave (striped), since their stretches would be single tokens.
    """
    stretches = sorted(
        ((run, rank, local) for rank, runs in enumerate(members) for run, local in located(runs)),
        key=lambda stretch: stretch[0].start,
    )
    for (earlier, *_), (later, *_) in pairwise(stretches):
        if earlier[-1] >= later.start:
            raise Refused("ranks whose positions interleave cannot be gathered; use layout 'zigzag' or 'contiguous'")
    ends = accumulate(len(run) for run, *_ in stretches)
    places = tuple(
        Place(rank, local, slice(end - len(run), end)) for (run, rank, local), end in zip(stretches, ends, strict=True)
    )
    return join([run for run, *_ in stretches]), places


def pieces(runs: Layout) -> tuple[int, int]:
    """Return how many pieces of the sequence every rank holds, and how many tokens each has."""
    count = max(map(len, runs))
    return count, length(runs[0]) // count


def check_chunks(runs: Layout, chunks: int) -> None:
    """Raise ValueError when `chunks` does not divide the tokens of a piece."""
    count, piece = pieces(runs)
    if piece % chunks:
        unit, tokens = chunks * count * len(runs), count * piece * len(runs)
        raise Refused(
            f"chunks must divide the {piece} tokens of each of a rank's {count} pieces, got chunks = {chunks}; "
            f"take a divisor or pad S = {tokens} to {-(-tokens // unit) * unit}"
        )


def located(runs: Runs) -> Iterator[tuple[range, slice]]:
    """Yield each run with the slice of local tokens that holds it."""
    start = 0
    for run in runs:
        yield run, slice(start, start + len(run))
        start += len(run)


def cut(runs: Runs, tokens: slice) -> Runs:
    """Return the positions of these local tokens."""
    parts = (run[max(0, tokens.start - at.start) : max(0, tokens.stop - at.start)] for run, at in located(runs))
    return tuple(normal(part) for part in parts if part)


class Move(NamedTuple):
    """Local tokens of rank `src` in one layout that are local tokens of rank `dst` in another."""

    src: int
    dst: int
    src_tokens: slice
    dst_tokens: slice


@remembered(cache_sizes.LAYOUTS)
def moves(before: Layout, after: Layout) -> tuple[Move, ...]:
    """List the moves that turn one layout into another, those within a rank included, by their ranks."""
    targets = sorted(
        ((run, local, dst) for dst, runs in enumerate(after) for run, local in located(runs)),
        key=lambda target: target[0].start,
    )
    starts = [run.start for run, _, _ in targets]
    # runs that start up to here end before this position
    ends = list(accumulate((run[-1] + 1 for run, _, _ in targets), max))
    found = [
        Move(src, dst, _within(shared, from_run, from_local), _within(shared, to_run, to_local))
        for src, from_runs in enumerate(before)
        for from_run, from_local in located(from_runs)
        for to_run, to_local, dst in targets[bisect_right(ends, from_run[0]) : bisect_right(starts, from_run[-1])]
        if (shared := _intersection(from_run, to_run))
    ]
    return tuple(sorted(found, key=lambda move: (move.src, move.dst, move.src_tokens.start)))


def common(one: Sequence[slice], other: Sequence[slice]) -> Iterator[tuple[int, slice]]:
    """Yield what two sorted lists of stretches have in common, each with its number in the second list."""
    first = 0
    for stretch in one:
        while first < len(other) and other[first].stop <= stretch.start:
            first += 1
        for number in range(first, len(other)):
            if other[number].start >= stretch.stop:
                break
            yield number, slice(max(stretch.start, other[number].start), min(stretch.stop, other[number].stop))


def _intersection(a: range, b: range) -> range:
    """Return the positions in both runs; their steps are equal or one of them is 1."""
    step = max(a.step, b.step)
    coarse, fine = (a, b) if a.step >= b.step else (b, a)
    if fine.step not in (1, coarse.step):
        raise Refused(f"runs with steps {a.step} and {b.step} cannot be intersected")
    if fine.step == coarse.step and (fine.start - coarse.start) % step:
        return range(0)
    skipped = max(0, -(-(fine.start - coarse.start) // step))
    first = coarse.start + skipped * step
    return range(first, max(first, min(coarse[-1], fine[-1]) + 1), step)


def _within(common: range, run: range, local: slice) -> slice:
    """Return the local tokens that hold `common`, a part of `run`."""
    first = local.start + (common[0] - run.start) // run.step
    step = common.step // run.step if len(common) > 1 else 1
    return slice(first, first + (len(common) - 1) * step + 1, step)


def _divide(tokens: int, parts: int, name: str, rule: str) -> int:
    if tokens % parts:
        fits = tokens + parts - tokens % parts
        raise Refused(f"layout {name!r} needs S divisible by {rule} = {parts}, got S = {tokens}; pad to {fits}")
    return tokens // parts
