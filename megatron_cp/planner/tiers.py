"""Where a run's state can lie outside of the GPU, and from how many tokens a step on that costs next to nothing.

What computing takes grows with the tokens of a step, what the optimizer's state takes to come and go does not
(ZeRO-Infinity, arXiv:2104.07857, section 4): long sequences hide it.
"""

from typing import NamedTuple

from megatron_cp.errors import Refused
from megatron_cp.hardware.cluster import Cluster
from megatron_cp.planner.model import Transformer

FREE = 0.05
"""Share of the computing that a tier may take and be called free."""
ADAM = 12
"""Bytes of the optimizer's state per parameter: float32 weight and two moments."""


class Tiers(NamedTuple):
    """Tokens of a step from which reading and writing the optimizer's state takes `FREE` of the computing.

    host, disk: the state is in host memory, or on the node's disks; None where the cluster does not say their rate
    activations: share of a layer's computing for which its input is on its way to the host and back
    """

    host: float | None
    disk: float | None
    activations: float | None


def tiers(model: Transformer, cluster: Cluster, seq: int, dtype: str = "bfloat16", state: int = ADAM) -> Tiers:
    """Return them for sequences of `seq` tokens and `state` bytes per parameter, spread over all ranks of any number.

    The computing is that of matrix products and attention at the cluster's rates, without recomputation.
    """
    token, host = token_seconds(model, cluster, seq, dtype), cluster.host_bytes_per_s

    def free(bytes_per_s: float | None) -> float | None:
        return None if bytes_per_s is None else 2 * state * model.parameters / bytes_per_s / (FREE * token)

    # in bf16, and forth and back
    there = None if host is None else 2 * 2 * model.hidden * model.layers / host / token
    return Tiers(free(host), free(disk_rate(cluster)), there)


def token_seconds(model: Transformer, cluster: Cluster, seq: int, dtype: str = "bfloat16") -> float:
    """Return the seconds of one rank that a token of a sequence takes, forward and backward, at the cluster's rates."""
    whole, products = (model.flops(length, 1) / length for length in (seq, 1))
    gemm = cluster.gemm(dtype)
    attention = (whole - products) / 3
    return (
        products / gemm.rate(gemm.sizes[-1])
        + attention / cluster.flops_forward
        + (2 * attention / cluster.flops_backward)
    )


def disk_rate(cluster: Cluster) -> float | None:
    """Return the bytes per second between a rank and its share of the node's disks; None where they are unknown."""
    if cluster.disk_bytes_per_s is None:
        return None
    return min(cluster.disk_bytes_per_s, cluster.host_bytes_per_s or cluster.disk_bytes_per_s)


def on_disk_seconds(cluster: Cluster, size: float) -> float:
    """Return the seconds of a step for `size` bytes of a rank's state, each read and written once.

    Raises ValueError where the cluster says nothing of its disks.
    """
    if not size:
        return 0.0
    rate = disk_rate(cluster)
    if rate is None:
        raise Refused(
            f"cluster {cluster.name!r} has no rate of a node's disks; add disk: peak_gb_per_s and efficiency to its "
            f"description, or leave --optimizer-state-dir out"
        )
    return 2 * size / rate
