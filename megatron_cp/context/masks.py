"""Masks: the keys that a query sees, as positions."""

from typing import NamedTuple

from megatron_cp.errors import Refused


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
            f"got {window!r}; leave it out for no window"
        )
    return limits[0], limits[1]
