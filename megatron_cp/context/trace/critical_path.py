"""How long an algorithm takes where nothing but kernel calls takes time: what is left is balance and order."""

from megatron_cp.context.trace.events import Pass
from megatron_cp.context.trace.simulate import Seconds, simulate
from megatron_cp.hardware.cluster import Cluster, Link

# as good as nothing: an infinite rate times no time is no number
AT_ONCE = 1e30

FREE = Cluster(
    name="links and copies free",
    dtype="any",
    flops_forward=AT_ONCE,
    flops_backward=AT_ONCE,
    call_s=0.0,
    touch_bytes_per_s=AT_ONCE,
    host_bytes_per_s=AT_ONCE,
    ranks_per_node=2**30,
    inside=Link(bytes_per_s=AT_ONCE, latency_s=0.0, ports="per-neighbour"),
    between=None,
)


def critical_path(run: Pass, seconds: Seconds) -> float:
    """Seconds until the last rank is done: each waits for what others send it, and what is sent is there at once."""
    return simulate(run, FREE, seconds).time
