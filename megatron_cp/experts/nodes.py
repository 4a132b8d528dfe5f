"""How the ranks that share the experts of a layer lie on nodes."""

from collections import Counter
from collections.abc import Iterable

from megatron_cp.errors import Refused
from megatron_cp.experts import TWO_HOP


def ranks_of_a_node(*groups: Iterable[int]) -> int:
    """Return how many ranks of a group lie on each of its nodes, from the node of each rank of each group.

    Raises ValueError where the numbers differ: a rank would have no like on another node, and ranks of one group would
    make groups together that those of another have no use for.
    """
    sizes = sorted({size for nodes in groups for size in Counter(nodes).values()})
    if len(sizes) > 1:
        raise Refused(
            f"--moe-comm-type {TWO_HOP} needs as many of the ranks that share a layer's experts on each node, got "
            f"{' and '.join(map(str, sizes))}; change --expert-model-parallel-size or --moe-ranks-per-node"
        )
    return sizes[0]
