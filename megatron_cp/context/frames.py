"""Frames of multimodal sequences: which rank encodes which, and where their embeddings go (LongVILA's MM-SP).

Stage 1 of multimodal sequence parallelism deals frames evenly to the ranks for the encoder. Its embeddings then go to
the ranks that hold their places in the sequence, which attend by any algorithm (stage 2). Everything here is a pure
function of sizes: ranks that agree on the frames agree on every message. Source: Chen et al. 2024, arXiv:2408.10188.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from heapq import heapify, heapreplace
from itertools import accumulate, groupby, pairwise, starmap
from typing import NamedTuple

from megatron_cp.context.layouts import Layout, PlannedLayout, length, moves, normal
from megatron_cp.errors import Refused, shown


class FramePlace(NamedTuple):
    """One appearance of a frame in the batch: its first embedding is the token at `start` of sequence `row`."""

    frame: int
    start: int
    row: int = 0


class UnevenParts(NamedTuple):
    """Tokens of one rank in an all-to-all with uneven counts.

    sends, recvs: tokens for each rank, and from each
    leaving:      stretches of the tokens that this rank brings, in order of the ranks that they go to
    arriving:     stretches of the tokens that it gets, in order of the ranks that they come from
    """

    sends: tuple[int, ...]
    recvs: tuple[int, ...]
    leaving: tuple[slice, ...]
    arriving: tuple[slice, ...]


@dataclass(frozen=True, kw_only=True)
class FrameDeal:
    """Frames of one microbatch, dealt to the ranks of a plan. Made by `deal_frames`, the same on all ranks but `rank`.

    tokens:  embeddings that the encoder makes of each frame
    by_rank: the frames that each rank encodes, in this order
    places:  where frames appear; a frame may appear several times
    layout:  positions of each rank's tokens in one sequence
    batch:   sequences of the microbatch
    """

    rank: int
    tokens: tuple[int, ...]
    by_rank: tuple[tuple[int, ...], ...]
    places: tuple[FramePlace, ...]
    layout: Layout
    batch: int

    @property
    def mine(self) -> tuple[int, ...]:
        """The frames that this rank encodes, in the order in which it brings their embeddings."""
        return self.by_rank[self.rank]

    @property
    def rows(self) -> int:
        """Embeddings that this rank brings: those of its frames."""
        return sum(self.tokens[frame] for frame in self.mine)

    @cached_property
    def held(self) -> PlannedLayout:
        """Places in the batch of the embeddings that each rank brings: of its frames in order, each with all places."""
        seq, places = tokens_of(self.layout), dict[int, list[range]]()
        for frame, start, row in self.places:
            places.setdefault(frame, []).append(_run(row * seq + start, self.tokens[frame]))
        return PlannedLayout(tuple(tuple(run for frame in mine for run in places[frame]) for mine in self.by_rank))

    @cached_property
    def uses(self) -> int:
        """Places that a frame has at most."""
        return max(Counter(place.frame for place in self.places).values(), default=1)

    @cached_property
    def brought(self) -> tuple[slice, ...]:
        """Stretches of this rank's embeddings that stand at its places in `held`, one for each place."""
        places = Counter(place.frame for place in self.places)
        ends = accumulate((self.tokens[frame] for frame in self.mine), initial=0)
        stretches = zip(self.mine, starmap(slice, pairwise(ends)), strict=True)
        return tuple(stretch for frame, stretch in stretches for _ in range(places[frame]))

    @cached_property
    def wanted(self) -> Layout:
        """Places in the batch of the tokens that each rank attends with: sequence by sequence."""
        return in_rows(self.layout, self.batch)

    @property
    def sent(self) -> tuple[int, ...]:
        """Embeddings that each rank sends forward; backward it sends the gradients of those that it received."""
        ranks = range(len(self.layout))
        return tuple(sum(count for peer, count in enumerate(self.parts(rank).sends) if peer != rank) for rank in ranks)

    @property
    def received(self) -> tuple[int, ...]:
        """Embeddings that each rank receives forward."""
        ranks = range(len(self.layout))
        return tuple(sum(count for peer, count in enumerate(self.parts(rank).recvs) if peer != rank) for rank in ranks)

    def parts(self, rank: int) -> UnevenParts:
        """Return what a rank sends and receives; `leaving` counts its embeddings once for each place."""
        return parts_of(self.held, self.wanted, rank)

    @cached_property
    def term(self) -> str:
        """Describe the deal in a line that is the same on all ranks that have the same one."""
        same = (self.tokens, self.by_rank, self.places, self.layout, self.batch)
        digest = blake2b(repr(same).encode(), digest_size=8).hexdigest()
        return f"{len(self.tokens)} frames in {self.batch} sequences of {tokens_of(self.layout)} tokens ({digest})"


def shares(
    frames: int, ranks: int, patches: Sequence[int] | None = None, most: int | None = None
) -> tuple[tuple[int, ...], ...]:
    """Return the frames that each rank encodes, in order; some ranks have none where there are fewer frames.

    patches: the encoder's work for each frame; None: all are equal
    most:    patches that a rank takes at most, frames where no patches are given
    Equal frames are cut into stretches whose numbers differ by one at most, as in LongVILA. Others are dealt largest
    first, each to the rank with fewest patches so far: no rank has more than 4/3 of what an optimal deal gives (Graham
    1969). Raises ValueError for frames that no rank can take.
    """
    if patches is None:
        work, ends = [1] * frames, [frames * rank // ranks for rank in range(ranks + 1)]
        dealt = tuple(tuple(range(first, last)) for first, last in pairwise(ends))
    else:
        work, dealt = list(patches), _largest_first(patches, ranks)
    if most is not None:
        _check_room(work, dealt, most, "frames" if patches is None else "patches")
    return dealt


def _largest_first(patches: Sequence[int], ranks: int) -> tuple[tuple[int, ...], ...]:
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    heapify(loads)
    for frame in sorted(range(len(patches)), key=lambda frame: -patches[frame]):
        load, rank = loads[0]
        dealt[rank].append(frame)
        heapreplace(loads, (load + patches[frame], rank))
    return tuple(tuple(sorted(mine)) for mine in dealt)


def _check_room(work: Sequence[int], dealt: Sequence[Sequence[int]], most: int, unit: str) -> None:
    largest = max(range(len(work)), key=work.__getitem__, default=None)
    if largest is not None and work[largest] > most:
        raise Refused(
            f"frame {largest} has {work[largest]} {unit}, and no rank takes more than {most}; make frames smaller, cut "
            "them into tiles, or raise most"
        )
    loads = [sum(work[frame] for frame in mine) for mine in dealt]
    if (load := max(loads)) > most:
        raise Refused(
            f"{len(work)} frames of {sum(work)} {unit} give one of {len(loads)} ranks {load}, and no rank takes more "
            f"than {most}; use more ranks or fewer frames, or raise most"
        )


def check_frames(tokens: Sequence[int], places: Sequence[FramePlace], seq: int, batch: int) -> None:
    """Raise Refused for frames whose embeddings no rank can take: outside of the batch, over each other, nowhere."""
    for frame, start, row in places:
        if not 0 <= frame < len(tokens) or not 0 <= row < batch:
            raise Refused(
                f"a place names a frame below {len(tokens)} and a row below {batch}, got frame {frame} in row {row}"
            )
        if not 0 <= start <= seq - tokens[frame]:
            raise Refused(
                f"frame {frame} has {tokens[frame]} tokens from position {start} on of a sequence of {seq}, and no "
                "rank can take those outside of it; pad the sequence, or leave the frame out"
            )
    if lost := set(range(len(tokens))) - {place.frame for place in places}:
        raise Refused(f"frame {min(lost)} has no place in the batch, and no rank can take it; leave it out")
    for one, two in pairwise(sorted(places, key=lambda place: (place.row, place.start))):
        if one.row == two.row and two.start < one.start + tokens[one.frame]:
            raise Refused(
                f"frames {one.frame} and {two.frame} both stand at position {two.start} of row {two.row}; frame "
                f"{one.frame} takes {tokens[one.frame]} positions, one for each of its tokens"
            )


def check_held(held: object, ranks: int, batch: int) -> Layout:
    """Return the places that each rank holds; raises Refused unless each place of the batch is held exactly once."""
    if not isinstance(held, Sequence) or len(held) != ranks or not all(_are_runs(runs) for runs in held):
        raise Refused(f"held must be a list of ranges of places for each of {ranks} ranks, got {shown(held)}")
    ours = tuple(tuple(normal(run) for run in runs if run) for runs in held)
    total = sum(map(length, ours))
    if not total or total % batch:
        raise Refused(f"held must have the places of all tokens of {batch} equally long sequences, got {total} places")
    marks = bytearray(total)
    for run in (run for runs in ours for run in runs):
        if run.step < 1 or run[0] < 0 or run[-1] >= total:
            raise Refused(f"held must be rising ranges of places below {total}, as many as there are in all, got {run}")
        marks[run.start : run[-1] + 1 : run.step] = b"\1" * len(run)
    if (missing := marks.find(0)) >= 0:
        row, position = divmod(missing, total // batch)
        raise Refused(
            f"held has {total} places, but position {position} of row {row} is with no rank and another with two; each "
            "token, pads too, is held by one rank"
        )
    return ours


def check_steps(held: Layout, wanted: Layout) -> None:
    """Raise Refused for ranges whose steps are neither 1 nor those of the ranges that ranks want."""
    theirs = {run.step for runs in wanted for run in runs} - {1}
    ours = {run.step for runs in held for run in runs} - {1}
    if theirs and ours - theirs:
        raise Refused(
            f"ranks want places of step {max(theirs)}, got ranges of step {max(ours - theirs)} that they hold; give "
            "each place of them as a range of its own, or hold them in ranges of step 1"
        )


def _are_runs(runs: object) -> bool:
    return isinstance(runs, Sequence) and all(isinstance(run, range) for run in runs)


def parts_of(before: Layout, after: Layout, rank: int) -> UnevenParts:
    """Return what a rank sends and receives to turn one layout into another, in which ranks may hold unlike numbers."""
    made = moves(before, after)
    leaving, arriving = [move for move in made if move.src == rank], [move for move in made if move.dst == rank]
    to = {dst: sum(size(move.src_tokens) for move in each) for dst, each in groupby(leaving, lambda move: move.dst)}
    of = {src: sum(size(move.dst_tokens) for move in each) for src, each in groupby(arriving, lambda move: move.src)}
    return UnevenParts(
        tuple(to.get(peer, 0) for peer in range(len(after))),
        tuple(of.get(peer, 0) for peer in range(len(after))),
        tuple(move.src_tokens for move in leaving),
        tuple(move.dst_tokens for move in arriving),
    )


def in_rows(layout: Layout, batch: int) -> Layout:
    """Return a layout's places in a batch: sequence by sequence, each counted behind the ones before it."""
    if batch == 1:
        return layout
    seq = tokens_of(layout)
    made = tuple(
        tuple(
            normal(range(run.start + row * seq, run.stop + row * seq, run.step)) for row in range(batch) for run in runs
        )
        for runs in layout
    )
    return PlannedLayout(made) if isinstance(layout, PlannedLayout) else made


def tokens_of(layout: Layout) -> int:
    """Return the tokens of the whole sequence."""
    return sum(map(length, layout))


def size(stretch: slice) -> int:
    """Return how many tokens a stretch of `moves` has."""
    return len(range(stretch.start, stretch.stop, stretch.step or 1))


def _run(start: int, tokens: int) -> range:
    return range(start, start + tokens)
