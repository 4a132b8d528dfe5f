"""Descriptions of clusters: configs/clusters/*.yaml, or a file of one's own.

Every figure is a rate that can be reached, so a peak from a data sheet stands beside the share of it that is reached.
"""

from bisect import bisect
from dataclasses import dataclass, replace
from math import log
from typing import Literal, get_args

from megatron_cp.errors import Refused

Collective = Literal["gather", "scatter", "reduce"]
"""All-gather, reduce-scatter, all-reduce."""
COLLECTIVES: tuple[Collective, ...] = get_args(Collective)


@dataclass(frozen=True, kw_only=True)
class Link:
    """One level of links.

    bytes_per_s: of one port, in each direction
    latency_s:   from the moment both sides are ready to the first byte
    ports:       "shared": one port per rank, as behind a switch; "per-neighbour": one for each rank it talks to
    busy_s_per_byte: time that a transfer takes from the computing rank, sent or received (0 where a device does it)
    busy_s_per_message: the same of a message of no size, sent and another received
    gather_bytes_per_s, scatter_bytes_per_s, reduce_bytes_per_s: that a rank sends in an all-gather, a reduce-scatter or
                 an all-reduce, its busy time in it; None where that is the port's rate
    """

    bytes_per_s: float
    latency_s: float
    ports: str
    busy_s_per_byte: float = 0.0
    busy_s_per_message: float = 0.0
    gather_bytes_per_s: float | None = None
    scatter_bytes_per_s: float | None = None
    reduce_bytes_per_s: float | None = None

    def rate(self, kind: Collective) -> float:
        """Bytes per second that a rank sends in a collective."""
        measured = {
            "gather": self.gather_bytes_per_s,
            "scatter": self.scatter_bytes_per_s,
            "reduce": self.reduce_bytes_per_s,
        }
        return measured[kind] or 1 / (1 / self.bytes_per_s + 2 * self.busy_s_per_byte)

    @property
    def least_s(self) -> float:
        """Until a message of no size has arrived and another has left."""
        return self.latency_s + self.busy_s_per_message

    def shared_by(self, sequences: int) -> "Link":
        """The link as one of several sequences sees it that share every message."""
        latency, busy = self.latency_s / sequences, self.busy_s_per_message / sequences
        return replace(self, latency_s=latency, busy_s_per_message=busy)


@dataclass(frozen=True)
class Gemm:
    """Matrix products of one dtype.

    sizes, rates: floating-point operations per second where the smallest of the three dimensions has this size; between
                  two sizes they follow its logarithm, beyond the ends they stay
    """

    peak: float
    sizes: tuple[int, ...]
    rates: tuple[float, ...]

    def rate(self, size: float) -> float:
        """Operations per second where the smallest dimension is `size`."""
        at = bisect(self.sizes, size)
        if at in (0, len(self.sizes)):
            return self.rates[min(at, len(self.sizes) - 1)]
        below, above = self.sizes[at - 1], self.sizes[at]
        share = log(size / below) / log(above / below)
        return self.rates[at - 1] * (1 - share) + self.rates[at] * share


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Equal nodes of equal ranks.

    dtype:             of the attention tensors that the rates hold for
    flops_forward, flops_backward: attention kernels, floating-point operations per second and rank
    call_s:            time of a kernel call beside its operations
    block_keys:        that the attention kernel takes at once, a causal mask or not; 0 where blocks are short
    touch_bytes_per_s: copies and sums, bytes read and written
    host_bytes_per_s:  to and from host memory, or None where there is no other memory
    between:           None for a single node
    gemms:             matrix products by dtype, for estimates of whole steps
    memory_bytes:      of a rank, None where the description does not say
    reserved_bytes:    part of it that is taken before any tensor is made: context, libraries, communication buffers
    elementwise_bytes_per_s: norms, rotary positions and activations, bytes counted as if each were one fused kernel;
                       None where they are, and go as fast as copies
    loss_bytes_per_s:  the cross entropy; None as above
    step_s:            of a training step, beside all work on tensors: data, logging, launching
    layer_s:           the same of a layer and microbatch; 0 where launching runs ahead of the device
    """

    name: str
    dtype: str
    flops_forward: float
    flops_backward: float
    call_s: float
    touch_bytes_per_s: float
    host_bytes_per_s: float | None
    ranks_per_node: int
    inside: Link
    between: Link | None
    gemms: tuple[tuple[str, Gemm], ...] = ()
    memory_bytes: float | None = None
    reserved_bytes: float = 0.0
    elementwise_bytes_per_s: float | None = None
    loss_bytes_per_s: float | None = None
    step_s: float = 0.0
    layer_s: float = 0.0
    block_keys: int = 0

    def gemm(self, dtype: str) -> Gemm:
        """Matrix products of a dtype; raises ValueError where the description has no rates for it."""
        known = dict(self.gemms)
        if dtype not in known:
            raise Refused(
                f"cluster {self.name!r} has no rates of {dtype} matrix products; add gemm.{dtype} to its description"
                + (f", which has {', '.join(known)}" if known else ", or measure them with megatron-cp calibrate")
            )
        return known[dtype]

    def group_rate(self, kind: Collective, ranks: int, stride: int) -> float:
        """Bytes per second that each of `ranks` ranks, `stride` apart, sends in a collective with both levels in use.

        A group over several nodes goes around through the ports of all its ranks on a node at once. Raises ValueError
        for a group over nodes that nothing joins.
        """
        link = self.link(0, (ranks - 1) * stride)
        if link is self.inside:
            return link.rate(kind)
        return min(self.inside.rate(kind), link.rate(kind) * max(1, self.ranks_per_node // stride))

    def link(self, src: int, dst: int) -> Link:
        """The level that joins two ranks; raises ValueError when they are on nodes that nothing joins."""
        if src // self.ranks_per_node == dst // self.ranks_per_node:
            return self.inside
        if self.between is None:
            raise Refused(
                f"cluster {self.name!r} is one node of {self.ranks_per_node} ranks; "
                "describe the links between nodes under 'between', or use fewer ranks"
            )
        return self.between

    def every(self, stride: int) -> "Cluster":
        """The cluster as it is among every `stride`-th rank: fewer of them on a node."""
        return replace(self, ranks_per_node=max(1, self.ranks_per_node // stride))

    def shared_by(self, sequences: int) -> "Cluster":
        """The cluster as one of several sequences sees it that share every kernel call and every message."""
        inside, between = self.inside.shared_by(sequences), self.between and self.between.shared_by(sequences)
        return replace(self, call_s=self.call_s / sequences, inside=inside, between=between)
