"""StarTrail: teams of C ranks share their queries and keys, and the keys of teams go around C concentric rings.

With C² dividing p there are C rings of p / C² places, each place held by one member of C teams. Forward (1) a team
gathers Q, K and V, (2) member j of a team swaps its team's keys for those of the team at the same place of ring j,
(3) the keys of teams go around, and (4) results come back to the owners of the queries and are merged. A rank sends
(C - 1) (Uq + 2 U), then 2 C U unless its team is of ring j already (one member in C), then (p / C² - 1) 2 C U, and
(C - 1) (Uq + Us); backward (C - 1) (3 Uq + 2 Us), the same for K and V, and for the gradients of all keys but its own
2 Ug (p / C - 1) or, where its own are not among them, 2 Ug p / C: they go straight to the owners. U = s b g d and
Uq = s b h d elements of the inputs, Ug = s b g d and Us = s b h of the accumulator. C = 1 is Ring Attention without its
pruning: keys travel whole under any mask.

The team is the inner axis of the hierarchical sizes; without these the C that sends least is taken.

Source: Liu et al. 2024, arXiv:2407.00611 (first named WallFacer); which teams share a ring, and the backward pass, are
derived here. Backend `wallfacer` on a grid of C x p / C has tiles as large without (2) and without gathering K and V.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from megatron_cp.comm import Fabric, Handle
from megatron_cp.context import cache_sizes
from megatron_cp.context.algorithms import rows_and_columns
from megatron_cp.context.algorithms.rows_and_columns import Tiling
from megatron_cp.context.merge import widening
from megatron_cp.context.packing import heads_of, packed, unpacked
from megatron_cp.context.returns import empty_like, exchange
from megatron_cp.context.task import Block, Saved, Task
from megatron_cp.grid import Grid, team_sizes


def forward(q: Tensor, k: Tensor, v: Tensor, task: Task) -> tuple[Tensor, Saved]:
    """Attend: q [s b h d], k and v [s b g d] of this rank -> out [s b h d]; twice the keys of a team are alive."""
    grid = _grid(q, task)
    return rows_and_columns.forward(q, k, v, _rings(k, v, grid, task), teams(grid), task)


def backward(dout: Tensor, saved: Saved, task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate: dout [s b h d] -> dq, dk, dv."""
    grid = _grid(dout, task)
    return rows_and_columns.backward(dout, saved, _rings(saved.k, saved.v, grid, task), teams(grid), task)


@lru_cache(cache_sizes.LAYOUTS)
def teams(grid: Grid) -> Tiling:
    """Return the teams whose keys arrive at each rank: member j sees the teams of ring j, from its own place on."""
    ranks, places = range(grid.inner * grid.outer), grid.outer // grid.inner
    members = [tuple(grid.members("inner", team * grid.inner)) for team in range(grid.outer)]
    rows = tuple(members[rank // grid.inner] for rank in ranks)
    hops = []
    for rank in ranks:
        team, ring = divmod(rank, grid.inner)
        hops.append(tuple(members[ring * places + (team - hop) % places] for hop in range(places)))
    return Tiling(rows, tuple(hops))


def _rings(k: Tensor, v: Tensor, grid: Grid, task: Task) -> Iterator[list[Block]]:
    """Yield the keys of a whole team in each hop, the next team's in flight during the body."""
    fabric, places = task.fabric, grid.outer // grid.inner
    team, member = divmod(fabric.rank, grid.inner)
    ring, place = divmod(team, places)

    def at(ring: int, place: int, member: int) -> int:
        return (ring * places + place % places) * grid.inner + member

    mirror, ahead, behind = at(member, place, ring), at(ring, place + 1, member), at(ring, place - 1, member)
    heads = heads_of(k, v)
    # 1. gather the keys and values of the team
    # s b (k v) d, so that K and V of a rank are one message
    held = _gathered(packed(k, v), grid.members("inner", fabric.rank), fabric)
    # 2. swap them for those of the team at the same place of ring `member`
    if mirror != fabric.rank:
        held, transfer = _passed(held, mirror, mirror, fabric)
        transfer.wait()
    # 3. pass the keys of teams on around the ring
    *hops, last = teams(grid).hops[fabric.rank]
    for owners in hops:
        arriving, transfer = _passed(held, ahead, behind, fabric)
        yield _blocks(owners, held, heads, task)
        transfer.wait()
        held = arriving
    yield _blocks(last, held, heads, task)


def _gathered(mine: Tensor, team: Sequence[int], fabric: Fabric) -> list[Tensor]:
    """Gather the keys and values of each member of the team."""
    held = [mine if rank == fabric.rank else torch.empty_like(mine) for rank in team]
    others = [(buffer, rank) for rank, buffer in zip(team, held, strict=True) if rank != fabric.rank]
    fabric.exchange([(mine, rank) for _, rank in others], others).wait()
    return held


def _passed(leaving: list[Tensor], dst: int, src: int, fabric: Fabric) -> tuple[list[Tensor], Handle]:
    arriving = empty_like(leaving, leaving[0].shape[0])
    return arriving, exchange(fabric, leaving, dst, arriving, src)


def _blocks(owners: Sequence[int], held: list[Tensor], heads: Sequence[tuple[int, int]], task: Task) -> list[Block]:
    pairs = ((owner, unpacked(both, heads)) for owner, both in zip(owners, held, strict=True))
    return [Block(owner, 0, k, v, task.layout[owner]) for owner, (k, v) in pairs]


def _grid(like: Tensor, task: Task) -> Grid:
    if task.axes:
        return task.axes.grid
    size = least(task.fabric.size, *task.heads, widening(like))
    return Grid(size, task.fabric.size // size)


@lru_cache(cache_sizes.LAYOUTS)
def least(ranks: int, heads: int, kv_heads: int, wide: int) -> int:
    """Return the size of teams with which both passes send the fewest elements, row statistics left out.

    A sum's element is as large as `wide` of the inputs'.
    """

    def elements(size: int) -> float:
        # q, out; q, dout, dq and k, v gathered, swapped and passed on, twice; sums of dk, dv
        keys = 4 * (size - 1) * (1 + 1) + 4 * size * (ranks // size**2 - 1) + 2 * wide * (ranks - 1) / size
        return 5 * heads * (size - 1) + kv_heads * keys

    return min(team_sizes(ranks), key=elements)
