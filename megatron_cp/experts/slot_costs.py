"""Costs of rows and of copies of experts on a cluster."""

from megatron_cp.experts.slots import SlotCosts
from megatron_cp.hardware.cluster import Cluster

DTYPE, BYTES = "bfloat16", 2
LINEARS = 3
"""h by f matrices of a gated expert."""

COPIES_CLUSTER = "dgx-h100"
"""The cluster by whose costs copies are placed where none is named."""


def slot_costs(
    hidden: int, ffn: int, ranks: int, cluster: Cluster, microbatches: int = 1, linears: int = LINEARS
) -> SlotCosts:
    """Return the costs of experts of h = hidden and f = ffn, whose rows, weights and gradients are bfloat16.

    Each multiplication has two more in backward; a row travels there and home, forward and backward; weights travel
    there once in a step, and gradients home after each microbatch. Ranks beyond a node's use the links between nodes
    for all of it.
    """
    rate = cluster.gemm(DTYPE).rate(min(hidden, ffn))
    link = (cluster.between if ranks > cluster.ranks_per_node else None) or cluster.inside
    return SlotCosts(
        row=3 * 2 * linears * hidden * ffn / rate,
        sent=4 * BYTES * hidden / link.bytes_per_s,
        lent=copy_bytes(hidden, ffn, microbatches, linears) / link.bytes_per_s,
    )


def copy_bytes(hidden: int, ffn: int, microbatches: int = 1, linears: int = LINEARS) -> int:
    """Return the bytes that one copy of an expert takes in a step: weights there, gradients home."""
    return (1 + microbatches) * BYTES * linears * hidden * ffn
