"""Descriptions of clusters: configs/clusters/*.yaml, or a file of one's own.

Every figure is a rate that can be reached, so a peak from a data sheet stands beside the share of it that is reached.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

from megatron_cp.recipe import configs_folder
from megatron_cp.registry import suggest

PORTS = ("shared", "per-neighbour")


@dataclass(frozen=True)
class Link:
    """One level of links.

    bytes_per_s: of one port, in each direction
    latency_s:   from the moment both sides are ready to the first byte
    ports:       "shared": one port per rank, as behind a switch; "per-neighbour": one for each rank it talks to
    busy_s_per_byte: time that a transfer takes from the computing rank, sent or received (0 where a device does it)
    """

    bytes_per_s: float
    latency_s: float
    ports: str
    busy_s_per_byte: float = 0.0


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal ranks.

    dtype:             of the attention tensors that the rates hold for
    flops_forward, flops_backward: attention kernels, floating-point operations per second and rank
    call_s:            time of a kernel call beside its operations
    touch_bytes_per_s: copies and sums, bytes read and written
    host_bytes_per_s:  to and from host memory, or None where there is no other memory
    between:           None for a single node
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

    def link(self, src: int, dst: int) -> Link:
        """The level that joins two ranks; raises ValueError when they are on nodes that nothing joins."""
        if src // self.ranks_per_node == dst // self.ranks_per_node:
            return self.inside
        if self.between is None:
            raise ValueError(
                f"cluster {self.name!r} is one node of {self.ranks_per_node} ranks; "
                "describe the links between nodes under 'between', or use fewer ranks"
            )
        return self.between

    def every(self, stride: int) -> "Cluster":
        """The cluster as it is among every `stride`-th rank: fewer of them on a node."""
        return replace(self, ranks_per_node=max(1, self.ranks_per_node // stride))


def shipped_clusters() -> list[str]:
    """Names of the shipped descriptions."""
    return sorted(path.stem for path in (configs_folder() / "clusters").glob("*.yaml"))


def load_cluster(name: str) -> Cluster:
    """The cluster that a file or a shipped name describes.

    Raises ValueError with file and line for a number that is missing, negative or none at all, and for unknown keys.
    """
    known = {path.stem: path for path in sorted((configs_folder() / "clusters").glob("*.yaml"))}
    file = Path(name) if Path(name).is_file() else known.get(name)
    if file is None:
        raise ValueError(f"no cluster {name!r}{suggest(name, known)}; give a file or one of: {', '.join(known)}")
    return _cluster(file)


ON_CPU = "this-cpu"

# SXM boards; those in PCIe slots have other links
BY_GPU = {"A100": "a100-ib", "H100": "h100-ib", "H200": "h100-ib"}


def cluster_of(gpu: str | None) -> str:
    """The shipped cluster for a GPU, by the name that CUDA gives it, or for a CPU.

    Raises ValueError for a GPU that no shipped cluster has.
    """
    if gpu is None:
        return ON_CPU
    words = gpu.upper().replace("-", " ").split()
    if not any(word.startswith("PCI") or word == "NVL" for word in words):
        for board, name in BY_GPU.items():
            if board in words:
                return name
    raise ValueError(
        f"no shipped cluster has {gpu!r}, so that 'auto' cannot tell what is fast; "
        f"pass --cp-cluster with a file of your own or one of: {', '.join(shipped_clusters())}"
    )


def _cluster(file: Path) -> Cluster:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError

    try:
        content = YAML(typ="rt").load(file.read_text(encoding="utf-8"))
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"{file}:{line}: {error.problem}") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{file}:1: a cluster is a mapping of compute, memory and links")
    top = _Section(file, "", content, ("compute", "memory", "host", "ranks_per_node", "inside", "between"))
    compute = top.section("compute", "dtype peak_tflops efficiency_forward efficiency_backward call_us")
    memory, peak = top.section("memory", "peak_gb_per_s efficiency"), compute.number("peak_tflops") * 1e12
    single = "between" not in content
    return Cluster(
        file.stem,
        compute.word("dtype", ("float64", "float32", "bfloat16", "float16")),
        peak * compute.share("efficiency_forward"),
        peak * compute.share("efficiency_backward"),
        compute.number("call_us", zero=True) * 1e-6,
        memory.number("peak_gb_per_s") * 1e9 * memory.share("efficiency"),
        _rate(top.section("host", "peak_gb_per_s efficiency")) if "host" in content else None,
        2**30 if single and "ranks_per_node" not in content else int(top.number("ranks_per_node")),
        _link(top.section("inside", LINK_KEYS)),
        None if single else _link(top.section("between", LINK_KEYS)),
    )


LINK_KEYS = "peak_gb_per_s efficiency latency_us ports busy_s_per_gb"


def _rate(section: "_Section") -> float:
    return section.number("peak_gb_per_s") * 1e9 * section.share("efficiency")


def _link(section: "_Section") -> Link:
    busy = section.number("busy_s_per_gb", zero=True) * 1e-9 if "busy_s_per_gb" in section.content else 0.0
    return Link(_rate(section), section.number("latency_us", zero=True) * 1e-6, section.word("ports", PORTS), busy)


class _Section:
    """A mapping of the file that knows where its values stand."""

    def __init__(self, file: Path, path: str, content: Any, keys: tuple[str, ...], line: int = 1) -> None:
        self._file, self._path, self.content, self._line = file, path, content, line
        for key in content:
            if key not in keys:
                raise ValueError(
                    f"{self._at(key)}: unknown key {path}{key}{suggest(str(key), keys)}; known: {', '.join(keys)}"
                )

    def section(self, key: str, keys: str) -> "_Section":
        value = self._value(key, "a mapping")
        if not isinstance(value, Mapping):
            raise ValueError(f"{self._at(key)}: {self._path}{key} must be a mapping, got {value!r}")
        return _Section(self._file, f"{key}.", value, tuple(keys.split()), self.content.lc.key(key)[0] + 1)

    def number(self, key: str, *, zero: bool = False) -> float:
        value = self._value(key, "a number")
        good = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
        if not good or value < 0 or (value == 0 and not zero):
            rule = "a number of 0 or more" if zero else "a positive number"
            raise ValueError(f"{self._at(key)}: {self._path}{key} must be {rule}, got {value!r}")
        return float(value)

    def share(self, key: str) -> float:
        value = self.number(key)
        if value > 1:
            raise ValueError(f"{self._at(key)}: {self._path}{key} is a share of the peak, at most 1, got {value!r}")
        return value

    def word(self, key: str, known: tuple[str, ...]) -> str:
        value = self._value(key, f"one of: {', '.join(known)}")
        if value not in known:
            raise ValueError(
                f"{self._at(key)}: {self._path}{key} must be one of: {', '.join(known)}; got {value!r}"
                f"{suggest(str(value), known)}"
            )
        return str(value)

    def _value(self, key: str, what: str) -> Any:
        if key not in self.content:
            raise ValueError(f"{self._file}:{self._line}: {self._path}{key} is missing; give {what}")
        return self.content[key]

    def _at(self, key: str) -> str:
        return f"{self._file}:{self.content.lc.key(key)[0] + 1}"
