"""How a flat buffer of parameters is cut into the ranks' parts, and how ranks lie on nodes. Pure."""

from collections.abc import Sequence
from typing import NamedTuple


class ParameterSpan(NamedTuple):
    """The elements of one parameter in a buffer; `exact` ones, such as norms' and embeddings', are not quantised."""

    start: int
    stop: int
    exact: bool = False


class RankPart(NamedTuple):
    """Elements of a buffer that one rank reduces and owns, those that are quantised and the others.

    A block holds elements of one parameter alone; elements between parameters are in no part.
    """

    coded: tuple[slice, ...]
    plain: tuple[slice, ...]


def parts_of(spans: Sequence[ParameterSpan], elements: int, ranks: int) -> tuple[RankPart, ...]:
    """Cut a buffer of so many elements into equal parts, one a rank; ValueError where that does not come out even."""
    if elements % ranks:
        raise ValueError(f"a buffer of {elements} elements has no {ranks} equal parts")
    size = elements // ranks
    parts = []
    for first in range(0, elements, size) if size else ():
        kept: dict[bool, list[slice]] = {True: [], False: []}
        for start, stop, exact in spans:
            low, high = max(start, first), min(stop, first + size)
            if low < high:
                kept[exact].append(slice(low, high))
        parts.append(RankPart(tuple(kept[False]), tuple(kept[True])))
    return tuple(parts) if size else (RankPart((), ()),) * ranks


def rows_of(slices: Sequence[slice], block: int) -> int:
    """Return the blocks that slices take, each of which fills up its last one."""
    return sum(-(-(each.stop - each.start) // block) for each in slices)


def places_of(nodes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return the rank at each place of each node, `[place][node]`, from the node of each rank.

    Where nodes have different numbers of ranks, each rank stands for a node of its own, and there is one hop.
    """
    found: dict[int, list[int]] = {}
    for rank, node in enumerate(nodes):
        found.setdefault(node, []).append(rank)
    if len({len(ranks) for ranks in found.values()}) > 1:
        return (tuple(range(len(nodes))),)
    return tuple(zip(*found.values(), strict=True))
