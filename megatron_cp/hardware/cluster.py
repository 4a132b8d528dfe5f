"""Describe clusters: configs/clusters/*.yaml, or the user's own file.

Every figure is an achievable rate; a file gives a data sheet's peak and the share of it that is reached.
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

    bytes_per_s: rate of one port in each direction
    latency_s:   from the moment both sides are ready to the first byte
    ports:       "shared": one port per rank, as behind a switch; "per-neighbour": one for each connected rank
    busy_s_per_byte: computing time that a rank loses per byte sent or received (0 where a device does the transfer)
    busy_s_per_message: computing time that a rank loses for sending and receiving an empty message
    pair_bytes_per_s: rate of one send and its receive between two pipeline ranks; None where it is the port's rate
    gather_bytes_per_s, scatter_bytes_per_s, reduce_bytes_per_s: rate at which a rank sends in an all-gather, a
                 reduce-scatter or an all-reduce, busy time included; None where it is the port's rate
    """

    bytes_per_s: float
    latency_s: float
    ports: str
    busy_s_per_byte: float = 0.0
    busy_s_per_message: float = 0.0
    pair_bytes_per_s: float | None = None
    gather_bytes_per_s: float | None = None
    scatter_bytes_per_s: float | None = None
    reduce_bytes_per_s: float | None = None

    def rate(self, kind: Collective) -> float:
        """Return the bytes per second that a rank sends in a collective."""
        measured = {
            "gather": self.gather_bytes_per_s,
            "scatter": self.scatter_bytes_per_s,
            "reduce": self.reduce_bytes_per_s,
        }
        return measured[kind] or 1 / (1 / self.bytes_per_s + 2 * self.busy_s_per_byte)

    def hop_seconds(self, size: float) -> float:
        """Return the seconds that a message of `size` bytes takes from one pipeline rank to the next."""
        return self.least_s + size / (self.pair_bytes_per_s or self.bytes_per_s) + size * self.busy_s_per_byte

    @property
    def least_s(self) -> float:
        """Seconds to send and receive an empty message."""
        return self.latency_s + self.busy_s_per_message

    def shared_by(self, sequences: int) -> "Link":
        """Return the link with latency and busy time per message divided by the sequences that share each message."""
        latency, busy = self.latency_s / sequences, self.busy_s_per_message / sequences
        return replace(self, latency_s=latency, busy_s_per_message=busy)


@dataclass(frozen=True)
class Gemm:
    """Rates of matrix products of one dtype.

    sizes, rates: floating-point operations per second by the smallest of the three dimensions, interpolated over its
                  logarithm and constant beyond the ends
    """

    peak: float
    sizes: tuple[int, ...]
    rates: tuple[float, ...]

    def rate(self, size: float) -> float:
        """Return the operations per second of a product whose smallest dimension is `size`."""
        at = bisect(self.sizes, size)
        if at in (0, len(self.sizes)):
            return self.rates[min(at, len(self.sizes) - 1)]
        below, above = self.sizes[at - 1], self.sizes[at]
        share = log(size / below) / log(above / below)
        return self.rates[at - 1] * (1 - share) + self.rates[at] * share

    def times(self, factor: float) -> "Gemm":
        """Return the products with all rates times a factor."""
        return replace(self, rates=tuple(rate * factor for rate in self.rates))


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A cluster of equal nodes with equal ranks.

    dtype:             dtype of the attention tensors that the rates hold for
    flops_forward, flops_backward: floating-point operations per second and rank of attention kernels
    call_s:            time of a kernel call beside its operations
    block_keys:        keys of one block of the attention kernel; 0 where blocks are too short to matter
    touch_bytes_per_s: rate of copies and sums, in bytes read and written
    host_bytes_per_s:  rate to and from host memory; None where the device's memory is the host's
    disk_bytes_per_s:  rate of each rank, reading or writing, while all ranks of a node use its disks; None where the
                       description does not state it
    between:           links between nodes; None for a single node
    gemms:             rates of matrix products by dtype, for estimates of whole steps
    memory_bytes:      memory of a rank; None where the description does not state it
    reserved_bytes:    part of it in use before any tensor is made: context, libraries, communication buffers
    elementwise_bytes_per_s: rate of norms, rotary positions, dropout and activations, with bytes counted as if each
                       were one fused kernel; None where it is the rate of copies
    unfused:           True if these are several kernels each, which keep what lies between them
    loss_bytes_per_s:  rate of the cross entropy; None where it is the rate of copies
    step_s:            time of a training step beside its work on tensors: data, logging, launching
    layer_s:           such time of a layer and microbatch; 0 where launching runs ahead of the device
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
    unfused: bool = False
    loss_bytes_per_s: float | None = None
    step_s: float = 0.0
    layer_s: float = 0.0
    block_keys: int = 0
    disk_bytes_per_s: float | None = None

    @property
    def device(self) -> str:
        """Kind of device: "cpu" where its memory is the host's, else "cuda"."""
        return "cpu" if self.host_bytes_per_s is None else "cuda"

    def gemm(self, dtype: str) -> Gemm:
        """Return the rates of matrix products of a dtype; raises ValueError where the description has none."""
        known = dict(self.gemms)
        if dtype not in known:
            raise Refused(
                f"cluster {self.name!r} has no rates of {dtype} matrix products; add gemm.{dtype} to its description"
                + (f", which has {', '.join(known)}" if known else ", or measure them with megatron-cp calibrate")
            )
        return known[dtype]

    def group_rate(self, kind: Collective, ranks: int, stride: int) -> float:
        """Return the bytes per second that each of `ranks` ranks, `stride` apart, sends in a collective.

        A group over several nodes uses the ports of all its ranks on a node at once. Raises ValueError for a group
        over nodes without links between them.
        """
        link = self.link(0, (ranks - 1) * stride)
        if link is self.inside:
            return link.rate(kind)
        return min(self.inside.rate(kind), link.rate(kind) * max(1, self.ranks_per_node // stride))

    def link(self, src: int, dst: int) -> Link:
        """Return the level of links between two ranks; raises ValueError for ranks on nodes without links."""
        if src // self.ranks_per_node == dst // self.ranks_per_node:
            return self.inside
        if self.between is None:
            raise Refused(
                f"cluster {self.name!r} is one node of {self.ranks_per_node} ranks; "
                "describe the links between nodes under 'between', or use fewer ranks"
            )
        return self.between

    def every(self, stride: int) -> "Cluster":
        """Return the cluster with only every `stride`-th rank of a node."""
        return replace(self, ranks_per_node=max(1, self.ranks_per_node // stride))

    def shared_by(self, sequences: int) -> "Cluster":
        """Return the cluster with costs per call and message divided by the sequences that share them."""
        inside, between = self.inside.shared_by(sequences), self.between and self.between.shared_by(sequences)
        return replace(self, call_s=self.call_s / sequences, inside=inside, between=between)
