"""Document layout `auto`: for each microbatch the layout whose attention takes least time on a cluster.

Zigzag over the stream sends least and calls fewest kernels, balanced blocks share the work: which of the two is faster
depends on the lengths of the documents. The choice is a function of these, of sizes and of a cluster's description, so
that ranks which agree on these agree on it without a message. Zigzag over each document is never chosen: it shares the
work as blocks do, for three times the traffic and ten times the kernel calls.
"""

from dataclasses import replace

import torch

from megatron_cp.context import cache_sizes
from megatron_cp.context.algorithms.all_gather import GROUPS
from megatron_cp.context.auto import default_cluster
from megatron_cp.context.checks import takes_document_layout
from megatron_cp.context.document_layouts import AUTO, BLOCKS, STREAM, Load, loads, planned
from megatron_cp.context.documents import Documents
from megatron_cp.context.masks import Pieces
from megatron_cp.context.plan import Plan, Sizes
from megatron_cp.context.remembered import remembered
from megatron_cp.hardware.cluster import Cluster

WEIGHED = (STREAM, BLOCKS)


def settle_layout(plan: Plan, sizes: Sizes, packed: Documents | None) -> Plan:
    """Return the plan with the document layout that is fastest for these documents; nothing is sent.

    A plan whose layout is not `auto`, or to which it makes no difference, comes back without a search.
    """
    if plan.document_layout != AUTO:
        return plan
    if packed is None or packed.layout is not None or plan.cp.size == 1 or not weighs(plan):
        return replace(plan, document_layout=STREAM)
    cluster = plan.cluster or default_cluster(sizes.device)
    return _settled(plan, sizes, packed.mask(plan.mask), cluster)


def weighs(plan: Plan) -> bool:
    """True if the work of a rank depends on the positions of its tokens."""
    return takes_document_layout(plan.backend) and plan.chunks is None and plan.backend.capabilities.heads != "all"


@remembered(cache_sizes.LAYOUTS)
def _settled(plan: Plan, sizes: Sizes, mask: Pieces, cluster: Cluster) -> Plan:
    return replace(plan, document_layout=choose_layout(mask, plan.cp.size, sizes, cluster, moved=True))


@remembered(cache_sizes.LAYOUTS)
def choose_layout(mask: Pieces, ranks: int, sizes: Sizes, cluster: Cluster, *, moved: bool) -> str:
    """Return the faster of `stream` and `blocks`.

    moved: tokens lie as the stream is cut, and move for blocks inside attention
    """
    times = {
        name: seconds(
            loads(planned(name, mask, sizes.seq, ranks), mask), sizes, cluster, moved=moved and name != STREAM
        )
        for name in WEIGHED
    }
    return min(times, key=lambda name: times[name])


def seconds(ranks: list[Load], sizes: Sizes, cluster: Cluster, *, moved: bool) -> float:
    """Return the predicted time of one attention, forward and backward, until the last rank is done.

    Keys come by `all-gather`: each token once to every rank that sees it, in groups of KV heads of which the first is
    waited for and the others come while the one before is computed. Gradients of them go back in float32.
    """
    link, width = cluster.link(0, len(ranks) - 1), getattr(torch, sizes.dtype).itemsize
    groups = min(GROUPS, sizes.kv_heads)
    per_pair = sizes.heads * sizes.head_dim * (4 / cluster.flops_forward + 10 / cluster.flops_backward)
    per_token = 2 * sizes.kv_heads * sizes.head_dim * (2 * width + 4)
    longest = 0.0
    for load in ranks:
        kernels = load.pairs * per_pair + 2 * groups * load.pieces * cluster.call_s
        size = load.received * per_token
        transfer = size / link.bytes_per_s + 2 * groups * link.latency_s
        longest = max(longest, max(kernels, transfer) + transfer / groups + size * 2 * link.busy_s_per_byte)
    if not moved:
        return longest
    # q, k, v there and out back, in both passes
    heads = 2 * (sizes.heads + sizes.kv_heads)
    size = 2 * sizes.seq // len(ranks) * heads * sizes.head_dim * width * (len(ranks) - 1) / len(ranks)
    copied = 4 * size / cluster.touch_bytes_per_s
    return longest + size / link.bytes_per_s + 4 * link.latency_s + copied + size * 2 * link.busy_s_per_byte
