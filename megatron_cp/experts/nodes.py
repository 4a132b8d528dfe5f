"""How the ranks that share the experts of a layer lie on nodes."""

from collections import Counter
from collections.abc import Iterable

from megatron_cp import config
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


def ranks_on_nodes(world: int, sharing: int, tensor: int, per_node: int | None) -> int:
    """Return how many of the ranks that share a layer's experts lie on a node, for all ranks of a run.

    sharing, tensor: ranks of expert parallelism and of expert tensor parallelism, which are neighbours
    per_node:        None for torchrun's LOCAL_WORLD_SIZE
    Raises ValueError where the numbers differ.
    """
    per_node = per_node or int(config.variable("LOCAL_WORLD_SIZE") or 0) or world
    span = sharing * tensor
    # the ranks of one group are as far apart as its experts have tensor-parallel ranks
    return ranks_of_a_node(
        *(
            [member // per_node for member in range(rank, first + span, tensor)]
            for first in range(0, world, span)
            for rank in range(first, first + tensor)
        )
    )
