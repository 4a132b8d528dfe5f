"""Measure the links, the memory and the attention kernel of this machine, as a cluster description.

Two processes of this machine communicate as the ranks of a run do, over gloo on a CPU and NCCL on GPUs.
"""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import SEEK_END, StringIO
from typing import Any

import torch

from megatron_cp.bench.calls import seconds
from megatron_cp.bench.comparison import DTYPES
from megatron_cp.bench.processes import on_ranks
from megatron_cp.comm import Fabric, largest
from megatron_cp.context.trace.events import Compute
from megatron_cp.hardware.cluster import Link
from megatron_cp.kernels import choose

type Sections = dict[str, dict[str, Any]]

MESSAGE = 16 << 20
ROUNDS = 15
TOKENS = 2048


@dataclass(frozen=True, kw_only=True)
class MachineRates:
    """Measured rates, in bytes and operations per second, and latencies in seconds.

    busy_s_per_byte: a core's time per byte sent and received
    call_s:          a kernel call on one token
    """

    device: str
    dtype: str
    bytes_per_s: float
    latency_s: float
    busy_s_per_byte: float
    touch_bytes_per_s: float
    flops_forward: float
    flops_backward: float
    call_s: float

    def as_yaml(self) -> str:
        """Return the description of one node that `load_cluster` reads."""
        return described(self, "bench links", self.sections())

    def sections(self) -> Sections:
        """Return the sections of that description as a mapping."""
        peak = max(self.flops_forward, self.flops_backward)
        return {
            "compute": {
                "dtype": self.dtype,
                "peak_tflops": peak / 1e12,
                "efficiency_forward": self.flops_forward / peak,
                "efficiency_backward": self.flops_backward / peak,
                "call_us": self.call_s * 1e6,
            },
            "memory": {"peak_gb_per_s": self.touch_bytes_per_s / 1e9, "efficiency": 1},
            "inside": {
                "peak_gb_per_s": self.bytes_per_s / 1e9,
                "efficiency": 1,
                "latency_us": self.latency_s * 1e6,
                "ports": "shared",
                "busy_s_per_gb": self.busy_s_per_byte * 1e9,
            },
        }


def described(links: MachineRates, command: str, sections: Sections) -> str:
    """Return the sections as YAML, numbers to four digits, below a comment on machine and command."""
    from ruamel.yaml import YAML

    file = StringIO(
        f"# {links.device}.\n"
        f"# MachineRates with two processes by: megatron-cp {command} --dtype {links.dtype} --write FILE\n"
        "# Measured rates are given as the peaks: the efficiencies are 1, except that of the slower pass.\n"
    )
    file.seek(0, SEEK_END)
    YAML().dump(_rounded(sections), file)
    return file.getvalue()


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(below) for key, below in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def measure_links(dtype: str = "float32") -> MachineRates:
    """Measure with two processes; on one core each, on a CPU."""
    return on_ranks(2, _measured, dtype)[0]


def _measured(fabric: Fabric, device: torch.device, dtype: str) -> MachineRates:
    link, touch = link_here(fabric, device), touch_here(fabric, device)
    forward, backward, call = _kernel(fabric, device, dtype)
    return MachineRates(
        device=torch.cuda.get_device_name() if device.type == "cuda" else _cpu(),
        dtype=dtype,
        bytes_per_s=link.bytes_per_s,
        latency_s=link.latency_s,
        busy_s_per_byte=link.busy_s_per_byte,
        touch_bytes_per_s=touch,
        flops_forward=forward,
        flops_backward=backward,
        call_s=call,
    )


def link_here(fabric: Fabric, device: torch.device) -> Link:
    """Measure the link between the first two ranks in both directions at once; every rank must call it."""
    latency, _ = _exchange(fabric, device, 8)
    whole, busy = _exchange(fabric, device, MESSAGE)
    return Link(
        bytes_per_s=MESSAGE / max(whole - latency, 1e-9),
        latency_s=latency,
        ports="shared",
        busy_s_per_byte=busy / (2 * MESSAGE),
    )


def _exchange(fabric: Fabric, device: torch.device, size: int) -> tuple[float, float]:
    """Return the best seconds in which both ranks send and receive `size` bytes, and the processor seconds in it."""
    here, there = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    peer = 1 - fabric.rank

    def once() -> None:
        if 0 <= peer < fabric.size:
            fabric.exchange([(here, peer)], [(there, peer)]).wait()

    return _best(fabric, device, once)


def touch_here(fabric: Fabric, device: torch.device) -> float:
    """Measure the bytes per second of a sum in place, on all ranks at the same time."""
    total, part = (torch.zeros(MESSAGE // 4, device=device) for _ in range(2))
    wall, _ = _best(fabric, device, lambda: total.add_(part))
    return 3 * MESSAGE / wall


def _kernel(fabric: Fabric, device: torch.device, dtype: str) -> tuple[float, float, float]:
    """Return operations per second forward and backward, and the seconds of a call on one token."""
    kernel, _ = choose("auto", device=device.type, dtype=dtype, head_dim=64)
    rates = []
    for backward in (False, True):
        call = Compute(TOKENS, TOKENS, 8, 8, 64, False, backward)
        (slowest,) = largest(fabric, device, seconds(call, kernel, device, DTYPES[dtype]))
        rates.append((10 if backward else 4) * call.head_dim * call.work / slowest)
    (least,) = largest(fabric, device, seconds(Compute(1, 1, 1, 1, 64, False, False), kernel, device, DTYPES[dtype]))
    return rates[0], rates[1], least


def _best(fabric: Fabric, device: torch.device, run: Callable[[], Any]) -> tuple[float, float]:
    """Return the slower rank's wall seconds and processor seconds, each in the best round."""
    walls, cores = [], []
    for _ in range(ROUNDS):
        largest(fabric, device)
        wall, core = time.perf_counter(), time.process_time()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        wall, core = largest(fabric, device, time.perf_counter() - wall, time.process_time() - core)
        walls.append(wall)
        cores.append(core)
    return min(walls), min(cores)


def _cpu() -> str:
    return f"{platform.machine()} CPU, one core per rank, torch {torch.__version__}"
