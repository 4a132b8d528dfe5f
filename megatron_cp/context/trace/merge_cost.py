"""The cost of merging partial results: kernels, bytes, and their share of the time of attention, counted."""

from typing import NamedTuple

from megatron_cp.context.merging import Merging
from megatron_cp.context.trace.events import Compute, Problem, Step, Touch
from megatron_cp.context.trace.record import record_rank
from megatron_cp.context.trace.simulate import flops

H100 = (600e12, 450e12, 2.6e12)
"""Operations per second of the attention kernels, forward and backward, and bytes per second of device memory."""


class MergeCost(NamedTuple):
    """Copies, merges and sums of a rank in a pass, between calls of the attention kernel.

    kernels: number of small kernels
    size:    bytes that they read and write
    share:   their time over that of the attention kernels
    peak:    most live bytes of the pass beyond the local q, k, v and dout
    """

    kernels: int
    size: int
    share: float
    peak: int


def merge_cost(problem: Problem, merging: Merging, rank: int) -> tuple[MergeCost, MergeCost]:
    """Count one rank's forward and backward pass; the times are those of the rates `H100`, without launches."""
    forward, backward = record_rank(problem, rank, merging)
    return _cost(forward, H100[0]), _cost(backward, H100[1])


def _cost(steps: tuple[Step, ...], flops_per_s: float) -> MergeCost:
    touches = [event for event, _ in steps if isinstance(event, Touch)]
    attention = sum(flops(event) for event, _ in steps if isinstance(event, Compute)) / flops_per_s
    size = sum(touch.size for touch in touches)
    kernels = sum(touch.kernels for touch in touches)
    return MergeCost(kernels, size, size / H100[2] / attention, max(live for _, live in steps))
