"""The rings in which a collective's bytes go around: one for each port of a node, as NCCL lays them."""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from megatron_cp.context import cache_sizes


@lru_cache(cache_sizes.GROUPS)
def rings(nodes: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Return the orders in which rings visit the ranks, given each rank's node: as many as the smallest node has ranks.

    Ring i enters every node at its i-th rank, so that the rings leave the nodes through different ports.
    """
    members = [[rank for rank, node in enumerate(nodes) if node == here] for here in dict.fromkeys(nodes)]
    count = min(map(len, members)) if len(members) > 1 else 1
    return tuple(tuple(rank for ranks in members for rank in (*ranks[i:], *ranks[:i])) for i in range(count))


@lru_cache(cache_sizes.PAIRS)
def neighbours(nodes: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ranks after and before this one, in each ring."""
    places = [(ring, ring.index(rank)) for ring in rings(nodes)]
    return tuple(ring[(at + 1) % len(ring)] for ring, at in places), tuple(ring[at - 1] for ring, at in places)


def shared(size: int, peers: Sequence[int]) -> dict[int, int]:
    """Return the bytes to or from each peer, of `size` bytes that are spread evenly over the rings."""
    found: Counter[int] = Counter()
    for i, peer in enumerate(peers):
        found[peer] += size * (i + 1) // len(peers) - size * i // len(peers)
    return {peer: share for peer, share in found.items() if share}
