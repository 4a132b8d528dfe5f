"""Seconds of matrix products and collectives on a cluster, by its rates."""

from math import ceil, log2
from typing import NamedTuple

from megatron_cp.hardware.cluster import Cluster, Collective


class Product(NamedTuple):
    """(rows x inner) times (inner x columns), `times` of them at once."""

    rows: float
    inner: float
    columns: float
    times: float = 1.0

    def seconds(self, cluster: Cluster, dtype: str, stored: int) -> float:
        """Return the seconds of its operations, or of moving operands of `stored` bytes where that takes longer."""
        rate = cluster.gemm(dtype).rate(min(self.rows, self.inner, self.columns))
        moved = stored * (self.rows * self.inner + self.inner * self.columns + self.rows * self.columns)
        seconds = max(2 * self.rows * self.inner * self.columns / rate, moved / cluster.touch_bytes_per_s)
        return self.times * (seconds + cluster.call_s)


def collective_seconds(cluster: Cluster, kind: Collective, size: float, ranks: int, stride: int) -> float:
    """Return the seconds of a collective over `size` bytes in all, among `ranks` ranks that are `stride` apart."""
    if ranks == 1:
        return 0.0
    # an all-reduce is a reduce-scatter and an all-gather
    rounds = 2 if kind == "reduce" else 1
    sent = size * (ranks - 1) / ranks
    latency = cluster.link(0, (ranks - 1) * stride).least_s * ceil(log2(ranks))
    return rounds * (sent / cluster.group_rate(kind, ranks, stride) + latency)
