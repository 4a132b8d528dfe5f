"""Masks: the keys that a query sees, as positions."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple, cast

from megatron_cp.context.remembered import Keeper
from megatron_cp.errors import Refused, shown


class Mask(NamedTuple):
    """The query at position i sees the keys at positions i - left .. i + right; None is no limit on that side."""

    left: int | None = None
    right: int | None = None

    @property
    def causal(self) -> bool:
        """True if no query sees a later key."""
        return self.right == 0

    @property
    def window(self) -> bool:
        """True if a query sees only a bounded stretch of earlier or later keys."""
        return self.left is not None or self.right not in (None, 0)

    @property
    def mirrored(self) -> "Mask":
        """This mask from the side of the keys: the key at position j is seen by queries j - right .. j + left."""
        return Mask(self.right, self.left)

    def pairs(self, queries: int, keys: int) -> int:
        """Return the unmasked pairs of a tile whose last query has its last key's position; every query sees a key."""
        hidden = 0
        if self.right is not None:
            hidden += _triangle(queries - 1 - self.right)
        if self.left is not None:
            hidden += _triangle(keys - 1 - self.left) - _triangle(keys - queries - 1 - self.left)
        return queries * keys - hidden

    def shifted(self, distance: int) -> "Mask":
        """Return this mask for queries shifted by `distance` positions relative to the keys."""
        left, right = self
        return Mask(None if left is None else left - distance, None if right is None else right + distance)


def _triangle(side: int) -> int:
    """Return 1 + 2 + ... + side."""
    return side * (side + 1) // 2 if side > 0 else 0


FULL = Mask()
CAUSAL = Mask(right=0)


class Piece(NamedTuple):
    """Queries at the positions `q` see those keys at the positions `kv` that lie in the band."""

    q: range
    kv: range
    band: Mask

    @property
    def causal(self) -> bool:
        """True if no query sees a later key."""
        return (self.band.right is not None and self.band.right <= 0) or self.kv.stop - 1 <= self.q.start

    def moved(self, queries: int, keys: int) -> "Piece":
        """Return this piece where positions of queries and of keys are counted from that much further on."""
        q, kv = (range(stretch.start - by, stretch.stop - by) for stretch, by in ((self.q, queries), (self.kv, keys)))
        return Piece(q, kv, self.band.shifted(queries - keys))


class Pieces(Keeper):
    """A mask with pieces: a query sees the keys of all pieces that it is in; no two pieces have a pair in common.

    It is equal to itself only, so that its hash costs nothing, and keeps what `remembered` functions return for it:
    all layers of a microbatch share these results, and they go when the microbatch does.
    """

    def __init__(self, pieces: Iterable[Piece]) -> None:
        kept = (piece for piece in pieces if piece.q and piece.kv)
        self.all = tuple(sorted(kept, key=lambda piece: (piece.q.start, piece.kv.start)))
        self.results = {}

    @cached_property
    def causal(self) -> bool:
        """True if no query sees a later key."""
        return all(piece.causal for piece in self.all)

    @cached_property
    def window(self) -> bool:
        """True if some query sees only a bounded stretch of its piece."""
        return any(piece.band.window for piece in self.all)

    @cached_property
    def mirrored(self) -> "Pieces":
        """This mask from the side of the keys."""
        return Pieces(Piece(kv, q, band.mirrored) for q, kv, band in self.all)

    def moved(self, queries: int, keys: int) -> "Pieces":
        """Return this mask where positions of queries and of keys are counted from that much further on."""
        key = (Pieces.moved, queries, keys)
        if key not in self.results:
            self.results[key] = Pieces(piece.moved(queries, keys) for piece in self.all)
        return cast("Pieces", self.results[key])

    def of(self, run: range) -> Iterator[tuple[int, Piece]]:
        """Yield the pieces, with their numbers, of which some query lies between the ends of the run."""
        starts, reach = self._bounds
        for index in range(bisect_right(reach, run[0]), bisect_left(starts, run[-1] + 1)):
            if self.all[index].q.stop > run[0]:
                yield index, self.all[index]

    @cached_property
    def _bounds(self) -> tuple[list[int], list[int]]:
        """Return where the queries of each piece start, and how far those of it and all before it reach."""
        return [piece.q.start for piece in self.all], list(accumulate((piece.q.stop for piece in self.all), max))


AnyMask = Mask | Pieces


def mask(causal: bool, window: tuple[int | None, int | None] | None = None) -> Mask:
    """Return the mask of flash-attn's two arguments; -1 or None in `window` is no limit, `causal` cuts the right at 0.

    Raises ValueError for any other negative limit, and for anything but two whole numbers.
    """
    left, right = (None if limit in (None, -1) else limit for limit in _pair(window))
    for limit in (left, right):
        if limit is not None and limit < 0:
            raise Refused(f"a window's limits are 0 or more, or -1 for none, got {tuple(window or ())}")
    return Mask(left, 0 if causal else right)


def _pair(window: object) -> tuple[int | None, int | None]:
    if window is None:
        return None, None
    limits = list(window) if isinstance(window, tuple | list) else []
    if len(limits) != 2 or not all(limit is None or type(limit) is int for limit in limits):
        raise Refused(
            "window is (left, right), the keys that a query sees on each side, whole numbers or -1 for no limit, "
            f"got {shown(window)}; leave it out for no window"
        )
    return limits[0], limits[1]
