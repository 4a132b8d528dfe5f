"""Reduce-scatter of gradients and all-gather of weights over nodes in two hops, quantised (ZeRO++, arXiv:2306.10209).

A reduction goes inside the nodes first: each rank adds up for its place what the ranks of its node have for the same
place in all nodes. Then ranks of one place send each other their parts. Numbers are rounded once a hop, not once a rank
as around a ring, and only a node's sums leave it. A gather goes the other way round.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_cp.comm import Fabric
from megatron_cp.replicas import Quantisation
from megatron_cp.replicas.blocks import LEFT, Coded, Coding, Plain
from megatron_cp.replicas.parts import RankPart, places_of, rows_of


class Hops(NamedTuple):
    """The ranks of this rank's node, those at its place in all nodes, and the rank at each `[place][node]`."""

    inside: Fabric
    between: Fabric
    ranks: tuple[tuple[int, ...], ...]

    @property
    def own(self) -> int:
        """Return this rank's number among all."""
        return self.ranks[self.inside.rank][self.between.rank]


def hops_of(fabric: Fabric, nodes: Sequence[int]) -> Hops:
    """Connect the ranks of a fabric along both hops, from the node of each; all ranks call it together."""
    ranks = places_of(nodes)
    place, node = next(
        (place, across.index(fabric.rank)) for place, across in enumerate(ranks) if fabric.rank in across
    )
    return Hops(fabric.subset([across[node] for across in ranks]), fabric.subset(ranks[place]), ranks)


class Left(NamedTuple):
    """Rests of quantised numbers at each hop, for the next reduction of the same buffer (arXiv:1901.09847)."""

    inside: Tensor
    between: Tensor


def nothing_left(parts: Sequence[RankPart], hops: Hops, quantisation: Quantisation, device: torch.device) -> Left:
    """Return zeros for a buffer: 2 bytes an element, and as many for each of those that this rank adds up.

    A hop of one rank sends nothing and leaves nothing over.
    """
    block = quantisation.block
    counts = _counts([part.coded for part in parts], hops, block)

    def zeros(rows: int, hop: Fabric) -> Tensor:
        return torch.zeros((rows if hop.size > 1 else 0, block), dtype=LEFT, device=device)

    return Left(zeros(sum(map(sum, counts)), hops.inside), zeros(sum(counts[hops.inside.rank]), hops.between))


def own_left(left: Left, parts: Sequence[RankPart], hops: Hops) -> list[Tensor]:
    """Return views [elements] of what this rank has left over of its own part, one for each slice that is quantised."""
    if hops.inside.size > 1:
        rows, order = left.inside, [rank for across in hops.ranks for rank in across]
    else:
        rows, order = left.between, list(hops.ranks[hops.inside.rank])
    before = sum(len(parts[rank].coded) for rank in order[: order.index(hops.own)])
    views = _views(rows, [each for rank in order for each in parts[rank].coded])
    return views[before : before + len(parts[hops.own].coded)]


@torch.no_grad()
def collect_left(left: Left, elements: int, parts: Sequence[RankPart], hops: Hops, quantisation: Quantisation) -> None:
    """Hand what all ranks have left over of each of a buffer's elements to the rank of its part.

    All ranks call it together. It then is all in `own_left`, so that a sum over steps is what it was but for rounding.
    """
    slices = [part.coded for part in parts]
    everyone = [each for across in hops.ranks for rank in across for each in slices[rank]]
    place = [each for rank in hops.ranks[hops.inside.rank] for each in slices[rank]]
    whole = left.inside.new_zeros(elements, dtype=torch.float32)
    for rows, of_rows in ((left.inside, everyone), (left.between, place)):
        if len(rows):
            torch._foreach_add_([whole[each] for each in of_rows], _views(rows.float(), of_rows))
        rows.zero_()
    # in float32 along both hops
    reduce_scatter(whole, [RankPart((), each) for each in slices], hops, quantisation)
    for view, each in zip(own_left(left, parts, hops), slices[hops.own], strict=True):
        view.copy_(whole[each])


@torch.no_grad()
def reduce_scatter(
    whole: Tensor, parts: Sequence[RankPart], hops: Hops, quantisation: Quantisation, left: Left | None = None
) -> None:
    """Put the sum over all ranks of this rank's part of `whole` [elements] in its place; all ranks call it together.

    Exact elements travel in the dtype of `whole`, along both hops too; all sums are float32.
    """
    for coding, slices in _codings(parts, quantisation, whole.dtype):
        counts = _counts(slices, hops, coding.block)
        rows = _packed(whole, [each for across in hops.ranks for rank in across for each in slices[rank]], coding)
        kept = left if isinstance(coding, Coded) else None
        place, node = hops.inside.rank, hops.between.rank
        rows = _hop(rows, list(map(sum, counts)), place, hops.inside, coding, kept.inside if kept else None)
        rows = _hop(rows, counts[place], node, hops.between, coding, kept.between if kept else None)
        _unpack(rows, whole, slices[hops.own])


def _hop(rows: Tensor, counts: Sequence[int], own: int, fabric: Fabric, coding: Coding, left: Tensor | None) -> Tensor:
    """Return the sum of what all ranks have for this one, of rows for each rank in turn."""
    if fabric.size == 1:
        return rows
    messages = fabric.all_to_all(coding.encode(rows, left), counts, [counts[own]] * fabric.size)
    return coding.add(messages.view(fabric.size, counts[own], messages.shape[1]))


@torch.no_grad()
def all_gather(whole: Tensor, parts: Sequence[RankPart], hops: Hops, quantisation: Quantisation) -> None:
    """Put each rank's part of `whole` [elements] in its place on all ranks, which call it together.

    All ranks have equal bits after it: the own part, too, is what its codes say.
    """
    for coding, slices in _codings(parts, quantisation, whole.dtype):
        counts = _counts(slices, hops, coding.block)
        own = coding.encode(_packed(whole, slices[hops.own], coding), None)
        every = own.new_empty((sum(map(sum, counts)), own.shape[1]))
        places = every.split(list(map(sum, counts)))
        place, node = hops.inside.rank, hops.between.rank
        across = places[place].split(counts[place])
        across[node].copy_(own)
        _share(across, node, hops.between)
        _share(places, place, hops.inside)
        rows = coding.add(every[None]) if isinstance(coding, Coded) else every
        _unpack(rows, whole, [each for row in hops.ranks for rank in row for each in slices[rank]])


def _share(parts: Sequence[Tensor], own: int, fabric: Fabric) -> None:
    """Send the own part to all others, and take theirs."""
    others = [rank for rank in range(fabric.size) if rank != own]
    fabric.exchange(
        [(parts[own], rank) for rank in others if parts[own].numel()],
        [(parts[rank], rank) for rank in others if parts[rank].numel()],
    ).wait()


class Sent(NamedTuple):
    """Bytes that a rank sends to ranks of its node, and to those of others."""

    inside: int
    between: int


def sent_to_reduce(
    parts: Sequence[RankPart], ranks: Sequence[Sequence[int]], quantisation: Quantisation, dtype: torch.dtype, own: int
) -> Sent:
    """Return what rank `own` sends in `reduce_scatter`; `ranks` is the rank at each `[place][node]`.

    Where each of N nodes of n ranks has whole blocks alone, these are (n-1) N and (N-1) messages a block of a part.
    """
    inside = between = 0
    for coding, slices in _codings(parts, quantisation, dtype):
        for across in ranks:
            for rank in across:
                size = rows_of(slices[rank], coding.block) * coding.width
                if own not in across:
                    inside += size
                elif rank != own:
                    between += size
    return Sent(inside, between)


def sent_to_gather(
    parts: Sequence[RankPart], ranks: Sequence[Sequence[int]], quantisation: Quantisation, dtype: torch.dtype, own: int
) -> Sent:
    """Return what rank `own` sends in `all_gather`: its part to other nodes, those of its place inside."""
    inside = between = 0
    (across,) = (across for across in ranks if own in across)
    for coding, slices in _codings(parts, quantisation, dtype):
        sizes = {rank: rows_of(slices[rank], coding.block) * coding.width for rank in across}
        between += (len(across) - 1) * sizes[own]
        inside += (len(ranks) - 1) * sum(sizes.values())
    return Sent(inside, between)


def _codings(
    parts: Sequence[RankPart], quantisation: Quantisation, dtype: torch.dtype
) -> Iterator[tuple[Coding, list[tuple[slice, ...]]]]:
    """Yield how elements travel, and each part's; nothing for a kind that no part has."""
    for coding, slices in (
        (Coded(quantisation), [part.coded for part in parts]),
        (Plain(dtype), [part.plain for part in parts]),
    ):
        if any(slices):
            yield coding, slices


def _counts(slices: Sequence[Sequence[slice]], hops: Hops, block: int) -> list[list[int]]:
    """Return the rows of the part at each `[place][node]`."""
    return [[rows_of(slices[rank], block) for rank in across] for across in hops.ranks]


def _packed(whole: Tensor, slices: Sequence[slice], coding: Coding) -> Tensor:
    """Return the slices as rows of a block, each filled up with zeros to whole rows; float32 where they are coded."""
    dtype = torch.float32 if isinstance(coding, Coded) else whole.dtype
    rows = whole.new_zeros((rows_of(slices, coding.block), coding.block), dtype=dtype)
    if slices:
        torch._foreach_copy_(_views(rows, slices), [whole[each] for each in slices])
    return rows


def _unpack(rows: Tensor, whole: Tensor, slices: Sequence[slice]) -> None:
    """Write rows back to where `_packed` took them from."""
    if slices:
        torch._foreach_copy_([whole[each] for each in slices], _views(rows, slices))


def _views(rows: Tensor, slices: Sequence[slice]) -> list[Tensor]:
    """Return the elements of each slice among the rows."""
    flat, block = rows.view(-1), rows.shape[1]
    views, first = [], 0
    for each in slices:
        size = each.stop - each.start
        views.append(flat[first : first + size])
        first += -(-size // block) * block
    return views
