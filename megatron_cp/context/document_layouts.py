"""Layouts of packed documents: which tokens of a microbatch each rank owns, so that ranks have equal work.

A causal mask over one document makes zigzag balanced; over several it does not, because the work of a token is the
part of its own document before it. The layouts here are planned for the documents of a microbatch: pure functions of
its mask, so that ranks which agree on the documents agree on the layout without a message.
"""

from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush
from itertools import cycle
from typing import NamedTuple

from megatron_cp.context import cache_sizes
from megatron_cp.context.layouts import Layout, PlannedLayout, Runs, common, gathered, join, zigzag
from megatron_cp.context.masks import Pieces
from megatron_cp.context.remembered import remembered
from megatron_cp.context.tiles import wanted
from megatron_cp.errors import Refused
from megatron_cp.registry import unknown

STREAM, DOCUMENT, BLOCKS = "stream", "document", "blocks"
AUTO = "auto"
"""For each microbatch the faster of `stream` and `blocks`: see `document_choice`."""

BLOCKS_PER_RANK = 8
"""Most blocks of a rank: fewer leave ranks unequal, more make it receive more keys and call more kernels."""

SWAPS = 200
"""Most exchanges of two blocks after the first assignment."""


def stream(mask: Pieces, tokens: int, ranks: int) -> Layout:
    """Zigzag over the whole sequence, whatever its documents: Megatron's cut; the least traffic."""
    return zigzag(tokens, ranks)


def per_document(mask: Pieces, tokens: int, ranks: int) -> Layout:
    """Zigzag over each document: 2 * ranks equal chunks of it, its other tokens one by one to the ranks in turn.

    Source: Wang et al. 2025 (WLB-LLM), arXiv:2503.17924, section 5.1.
    """
    check_tokens(DOCUMENT, tokens, ranks)
    owned: list[list[range]] = [[] for _ in range(ranks)]
    turn = cycle(range(ranks))
    for document in stretches(mask, tokens):
        size = len(document) // (2 * ranks)
        rest = document.start + 2 * ranks * size
        for rank in range(ranks if size else 0):
            for chunk in (rank, 2 * ranks - 1 - rank):
                start = document.start + chunk * size
                owned[rank].append(range(start, start + size))
        for position in range(rest, document.stop):
            owned[next(turn)].append(range(position, position + 1))
    return tuple(join(sorted(runs, key=lambda run: run.start)) for runs in owned)


def balanced_blocks(mask: Pieces, tokens: int, ranks: int) -> Layout:
    """Equal blocks of the sequence, as many for every rank, so that all ranks have about the same unmasked pairs.

    The block with most pairs goes first, to the rank with fewest that still takes one; then blocks of the rank with
    most and of the one with fewest pairs are exchanged for as long as that brings the two closer together.
    """
    check_tokens(BLOCKS, tokens, ranks)
    share = tokens // ranks
    count = next(count for count in range(BLOCKS_PER_RANK, 0, -1) if share % count == 0)
    size = share // count
    runs = [range(start, start + size) for start in range(0, tokens, size)]
    work = [pairs((run,), mask) for run in runs]
    owned = _exchanged(_assigned(work, ranks, count), work)
    return tuple(join([runs[block] for block in sorted(blocks)]) for blocks in owned)


DOCUMENT_LAYOUTS: dict[str, Callable[[Pieces, int, int], Layout]] = {
    STREAM: stream,
    DOCUMENT: per_document,
    BLOCKS: balanced_blocks,
}


NAMES = (AUTO, *DOCUMENT_LAYOUTS)


@remembered(cache_sizes.LAYOUTS)
def planned(name: str, mask: Pieces, tokens: int, ranks: int) -> PlannedLayout:
    """Return the layout called `name` of a sequence of `tokens` with such a mask.

    Raises ValueError for an unknown name and when the ranks cannot have equally many tokens.
    """
    if name not in DOCUMENT_LAYOUTS:
        raise unknown("document layout", name, DOCUMENT_LAYOUTS)
    return PlannedLayout(DOCUMENT_LAYOUTS[name](mask, tokens, ranks))


def as_numbers(layout: Layout) -> list[int]:
    """Return a layout for documents as whole numbers: rank, start and end of each of its runs."""
    return [number for rank, runs in enumerate(layout) for run in runs for number in (rank, run.start, run.stop)]


def of_numbers(numbers: Sequence[int], ranks: int) -> PlannedLayout:
    """Return the layout of so many ranks that `as_numbers` made these of."""
    owned: list[list[range]] = [[] for _ in range(ranks)]
    for rank, start, stop in zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True):
        owned[rank].append(range(start, stop))
    return PlannedLayout(tuple(map(tuple, owned)))


def check_tokens(name: str, tokens: int, ranks: int) -> None:
    """Raise ValueError when the ranks cannot have equally many tokens."""
    if tokens % ranks:
        raise Refused(
            f"document layout {name!r} needs S divisible by context_parallel_size = {ranks}, got S = {tokens}; "
            f"pad to {tokens + ranks - tokens % ranks}"
        )


def stretches(mask: Pieces, tokens: int) -> list[range]:
    """Return the documents: stretches of positions that see nothing outside of themselves, and what lies between."""
    found: list[range] = []
    spans = sorted((min(piece.q.start, piece.kv.start), max(piece.q.stop, piece.kv.stop)) for piece in mask.all)
    for start, stop in [*spans, (tokens, tokens)]:
        end = found[-1].stop if found else 0
        if start < end:
            found[-1] = range(found[-1].start, max(end, stop))
            continue
        if start > end:
            found.append(range(end, start))
        if stop > start:
            found.append(range(start, stop))
    return found


def pairs(runs: Runs, mask: Pieces) -> int:
    """Return the unmasked pairs of the queries at these positions, neighbouring ones in each run."""
    return sum(_pairs_in(run, *piece) for run in runs for _, piece in mask.of(run))


def _pairs_in(run: range, q: range, kv: range, band: tuple[int | None, int | None]) -> int:
    first, last = max(run.start, q.start), min(run.stop, q.stop) - 1
    if first > last:
        return 0
    (left, right), keys = band, len(kv)
    # each query has reached as many keys as lie up to `right` after it, and passed those more than `left` before it
    reached = keys * (last - first + 1) if right is None else _climbed(first + right + 1 - kv.start, last - first, keys)
    passed = 0 if left is None else _climbed(first - left - kv.start, last - first, keys)
    return reached - passed


def _climbed(first: int, further: int, most: int) -> int:
    """Return the sum of first, first + 1, ..., first + further, each of them at least 0 and at most `most`."""
    above = _triangle(first + further) - _triangle(first - 1)
    return above - _triangle(first + further - most) + _triangle(first - 1 - most)


def _triangle(side: int) -> int:
    return side * (side + 1) // 2 if side > 0 else 0


def _assigned(work: Sequence[int], ranks: int, count: int) -> list[list[int]]:
    """Give every rank `count` blocks, the largest block first and to the rank that has least."""
    owned: list[list[int]] = [[] for _ in range(ranks)]
    least = [(0, rank) for rank in range(ranks)]
    heapify(least)
    for block in sorted(range(len(work)), key=lambda block: -work[block]):
        load, rank = heappop(least)
        owned[rank].append(block)
        if len(owned[rank]) < count:
            heappush(least, (load + work[block], rank))
    return owned


def _exchanged(owned: list[list[int]], work: Sequence[int]) -> list[list[int]]:
    """Exchange blocks between the rank with most and the rank with least work until no exchange narrows the gap."""
    loads = [sum(work[block] for block in blocks) for blocks in owned]
    for _ in range(SWAPS):
        most, least = loads.index(max(loads)), loads.index(min(loads))
        gap = loads[most] - loads[least]
        # the nearest to half of the gap makes the two most equal
        moved, i, j = min(
            (
                (abs(2 * moved - gap), i, j)
                for i, heavy in enumerate(owned[most])
                for j, light in enumerate(owned[least])
                if 0 < (moved := work[heavy] - work[light]) < gap
            ),
            default=(0, -1, -1),
        )
        if i < 0:
            break
        moved = work[owned[most][i]] - work[owned[least][j]]
        owned[most][i], owned[least][j] = owned[least][j], owned[most][i]
        loads[most] -= moved
        loads[least] += moved
    return owned


class Load(NamedTuple):
    """Work and traffic of one rank under a layout.

    pairs:    unmasked pairs of its queries
    received: tokens of other ranks whose keys its queries see
    pieces:   stretches of its queries that are neighbours in one piece of the mask: kernel calls, or fewer
    """

    pairs: int
    received: int
    pieces: int


def loads(layout: Layout, mask: Pieces) -> list[Load]:
    """Return the load of every rank; keys are counted as `all-gather` sends them, each token once to each rank."""
    whole, places = gathered(layout)
    found = []
    for rank, runs in enumerate(layout):
        reach = wanted(runs, whole, mask)
        others = common(reach, [place.whole for place in places])
        received = sum(part.stop - part.start for index, part in others if places[index].rank != rank)
        found.append(Load(pairs(runs, mask), received, sum(1 for run in runs for _ in mask.of(run))))
    return found
