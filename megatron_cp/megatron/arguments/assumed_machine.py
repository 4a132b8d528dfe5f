"""Let torch.cuda and Megatron's probes answer for another machine, for checks of a run.

Megatron's argument checks ask for the GPU's architecture and for versions of packages that a laptop lacks. Inside
`assumed()` the answers come from the cluster's description; leaving it restores every name. Calls that would use a
device are not replaced and fail as they do without a GPU. Our own checks take the machine as a parameter.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

from packaging.version import Version

from megatron_cp.hardware.cluster import Cluster
from megatron_cp.megatron import rebind
from megatron_cp.megatron.machine import cpu
from megatron_cp.megatron.machine.facts import Machine, this_machine

# the newest that megatron-core 0.19 asks for anywhere; `megatron-cp doctor` checks the real one on the cluster
TE_VERSION = "2.14.0"


class Gpu(NamedTuple):
    """A GPU as CUDA describes it."""

    name: str
    capability: tuple[int, int]
    memory_bytes: float


BOARDS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 80e9),
    "a800": Gpu("NVIDIA A800-SXM4-80GB", (8, 0), 80e9),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 80e9),
    "h800": Gpu("NVIDIA H800", (9, 0), 80e9),
    "h200": Gpu("NVIDIA H200", (9, 0), 141e9),
    "b200": Gpu("NVIDIA B200", (10, 0), 180e9),
}
# Megatron asks for most below Blackwell
UNKNOWN = Gpu("GPU", (9, 0), 80e9)


def gpu_of(cluster: Cluster) -> Gpu | None:
    """Return the GPU of a cluster, by its name; None for a cluster of CPUs, which has no memory beside the host's."""
    if cluster.host_bytes_per_s is None:
        return None
    board = next((gpu for word, gpu in BOARDS.items() if word in cluster.name.lower()), UNKNOWN)
    return board._replace(memory_bytes=cluster.memory_bytes or board.memory_bytes)


class Assumed(NamedTuple):
    """The machine for our own checks, and one line for each assumption about it."""

    machine: Machine
    told: list[str]


@contextlib.contextmanager
def assumed(cluster: Cluster) -> Iterator[Assumed]:
    """Let torch.cuda and Megatron's probes answer for `cluster` inside the context."""
    gpu = gpu_of(cluster)
    # data and checkpoints lie on the cluster
    there = replace(this_machine(), inputs=False)
    with contextlib.ExitStack() as undo:
        done: list[rebind.Replaced] = []
        undo.callback(rebind.restore_all, done)
        if gpu is None:
            undo.enter_context(cpu.cpu_runtime())
            yield Assumed(replace(there, gpu=False, te=False), ["CPUs, no transformer-engine"])
            return
        table = {**_answers(gpu, cluster.ranks_per_node), **PACKAGES}
        done.extend(rebind.replace(target, make) for target, make in table.items())
        yield Assumed(replace(there, gpu=True, te=True), _told(gpu, cluster))


def _told(gpu: Gpu, cluster: Cluster) -> list[str]:
    major, minor = gpu.capability
    boards = f"{cluster.ranks_per_node} x {gpu.name} of {gpu.memory_bytes / 1e9:.0f} GB a node"
    return [f"{boards}, compute capability {major}.{minor}", f"transformer-engine {TE_VERSION} with its fused kernels"]


def _answers(gpu: Gpu, count: int) -> dict[str, Callable[[Any], Any]]:
    major, minor = gpu.capability
    properties = SimpleNamespace(name=gpu.name, major=major, minor=minor, total_memory=int(gpu.memory_bytes))
    values = {
        "is_available": True,
        "device_count": count,
        "current_device": 0,
        "get_device_properties": properties,
        "get_device_capability": gpu.capability,
        "get_device_name": gpu.name,
    }
    return {f"torch.cuda:{name}": _answer(value) for name, value in values.items()}


def _answer(value: Any) -> Callable[[Any], Any]:
    return lambda _: lambda *args, **kwargs: value


def _fused(old: Any) -> Any:
    # only asked for, never called
    return old if old is not None else lambda *args, **kwargs: None


# transformer-engine and its kernels, whether or not they are installed here
PACKAGES: dict[str, Callable[[Any], Any]] = {
    "megatron.core.utils:_te_version": lambda _: Version(TE_VERSION),
    **{
        f"megatron.core.models.common.embeddings.rope_utils:{name}": _fused
        for name in ("fused_apply_rotary_pos_emb", "fused_apply_rotary_pos_emb_thd")
    },
    **{
        f"megatron.core.transformer.moe.moe_utils:{name}": _fused
        for name in (
            "fused_permute fused_permute_with_probs fused_sort_chunks_by_index "
            "fused_sort_chunks_by_index_with_probs fused_unpermute"
        ).split()
    },
}
