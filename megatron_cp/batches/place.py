"""Place the groups of a slot on ranks: largest first, contiguous, and inside a node where a node holds them."""

from collections.abc import Sequence


def place(degrees: Sequence[int], ranks: int, per_node: int) -> list[int] | None:
    """Return the first rank of each group, or None if they do not fit.

    Groups of at most `per_node` ranks lie inside one node. Larger ones begin with a node.
    """
    free = [range(ranks)]
    first = [0] * len(degrees)
    for at in sorted(range(len(degrees)), key=lambda at: -degrees[at]):
        found = _room(free, degrees[at], per_node)
        if found is None:
            return None
        index, start = found
        gap, end = free[index], start + degrees[at]
        free[index : index + 1] = [part for part in (range(gap.start, start), range(end, gap.stop)) if part]
        first[at] = start
    return first


def _room(free: Sequence[range], degree: int, per_node: int) -> tuple[int, int] | None:
    """Return the gap and the first rank for a group; None if there is no room."""
    for index, gap in enumerate(free):
        start = gap.start
        # a larger group than a node begins with one
        if start % per_node + degree > max(degree, per_node):
            start += -start % per_node
        if start + degree <= gap.stop:
            return index, start
    return None
