"""Read the description of a cluster: keys, units and rules of a file, merged over the description that it extends."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

from ruamel.yaml import YAML

from megatron_cp.config import configs_folder
from megatron_cp.dtypes import BYTES, TRAINING
from megatron_cp.errors import Refused
from megatron_cp.hardware.cluster import Cluster, Gemm, Link
from megatron_cp.registry import suggest, unknown
from megatron_cp.yaml_file import parse

PORTS = ("shared", "per-neighbour")
SECTIONS = ("extends", "compute", "memory", "host", "disk", "ranks_per_node", "inside", "between", "gemm", "overhead")
COMPUTE_KEYS = "dtype peak_tflops efficiency_forward efficiency_backward call_us block_keys"
MEMORY_KEYS = "peak_gb_per_s efficiency size_gb reserved_gb elementwise_efficiency elementwise_gb_per_s loss_gb_per_s"
LINK_KEYS = (
    "peak_gb_per_s efficiency latency_us ports busy_s_per_gb busy_us_per_message pair_gb_per_s "
    "gather_gb_per_s scatter_gb_per_s reduce_gb_per_s"
)
DISK_KEYS = "peak_gb_per_s efficiency"
LIMIT = 1e30
"""Numbers of a description are smaller, so that no rate in bytes or operations per second is infinite."""

ON_CPU = "this-cpu"

# SXM boards only, because PCIe boards have other links
BY_GPU = {"A100": "a100-ib", "H100": "h100-ib", "H200": "h100-ib"}


def shipped_clusters() -> list[str]:
    """Return the names of the shipped descriptions."""
    return sorted(path.stem for path in (configs_folder() / "clusters").glob("*.yaml"))


def load_cluster(name: str) -> Cluster:
    """Return the cluster that a file or a shipped name describes.

    Raises ValueError with file and line for a value that is missing, negative or not a number, and for unknown keys.
    """
    known = {path.stem: path for path in sorted((configs_folder() / "clusters").glob("*.yaml"))}
    file = Path(name) if Path(name).is_file() else known.get(name)
    if file is None:
        raise Refused(f"no cluster {name!r}{suggest(name, known)}; give a file or one of: {', '.join(known)}")
    return read(file)


def cluster_of(gpu: str | None) -> str:
    """Return the shipped cluster for a GPU, by its name in CUDA, or for a CPU.

    Raises ValueError for a GPU without a shipped cluster.
    """
    if gpu is None:
        return ON_CPU
    words = gpu.upper().replace("-", " ").split()
    if not any(word.startswith("PCI") or word == "NVL" for word in words):
        for board, name in BY_GPU.items():
            if board in words:
                return name
    raise Refused(
        f"no shipped cluster has {gpu!r}, so that 'auto' cannot tell what is fast; "
        f"pass --cp-cluster, or --moe-cluster for experts, with a file of your own or one of: "
        f"{', '.join(shipped_clusters())}"
    )


def read(file: Path) -> Cluster:
    """Return the cluster in `file`; raises ValueError with file and line for missing, unknown or invalid values."""
    top = _read(file, ())
    compute = top.section("compute", COMPUTE_KEYS)
    memory, peak = top.section("memory", MEMORY_KEYS), compute.number("peak_tflops") * 1e12
    overhead = top.section("overhead", "step_ms layer_us") if top.has("overhead") else None
    single = not top.has("between")
    ranks_per_node = 2**30 if single and not top.has("ranks_per_node") else top.count("ranks_per_node")
    return Cluster(
        name=file.stem,
        dtype=compute.word("dtype", tuple(BYTES)),
        flops_forward=peak * compute.share("efficiency_forward"),
        flops_backward=peak * compute.share("efficiency_backward"),
        call_s=compute.number("call_us", zero=True) * 1e-6,
        touch_bytes_per_s=memory.number("peak_gb_per_s") * 1e9 * memory.share("efficiency"),
        host_bytes_per_s=_rate(top.section("host", "peak_gb_per_s efficiency")) if top.has("host") else None,
        ranks_per_node=ranks_per_node,
        inside=_link(top.section("inside", LINK_KEYS)),
        between=None if single else _link(top.section("between", LINK_KEYS)),
        gemms=_gemms(top.section("gemm", " ".join(("fp8", *TRAINING)))) if top.has("gemm") else (),
        memory_bytes=memory.optional("size_gb", 1e9),
        reserved_bytes=memory.optional("reserved_gb", 1e9, 0.0),
        elementwise_bytes_per_s=_elementwise(memory),
        unfused=memory.has("elementwise_gb_per_s"),
        loss_bytes_per_s=memory.optional("loss_gb_per_s", 1e9),
        step_s=overhead.optional("step_ms", 1e-3, 0.0) if overhead else 0.0,
        layer_s=overhead.optional("layer_us", 1e-6, 0.0) if overhead else 0.0,
        block_keys=compute.count("block_keys") if compute.has("block_keys") else 0,
        disk_bytes_per_s=_of_rank(top, ranks_per_node) if top.has("disk") else None,
    )


def _read(file: Path, open_files: tuple[Path, ...]) -> "_Section":
    """Return the file's mapping, merged over that of the description that it extends."""
    if file in open_files:
        raise Refused(f"{file}:1: extends itself: {' -> '.join(path.name for path in (*open_files, file))}")
    content = parse(file, YAML(typ="rt").load)
    if not isinstance(content, Mapping):
        raise Refused(f"{file}:1: a cluster is a mapping of compute, memory and links")
    top = _Section(file, "", content, SECTIONS)
    if "extends" in content:
        known = tuple(shipped_clusters())
        below = configs_folder() / "clusters" / f"{top.word('extends', known)}.yaml"
        top.below = _read(below, (*open_files, file))
    return top


def _gemms(section: "_Section") -> tuple[tuple[str, Gemm], ...]:
    return tuple((dtype, _gemm(section.section(dtype, "peak_tflops efficiency"))) for dtype in section.names)


def _gemm(section: "_Section") -> Gemm:
    peak = section.number("peak_tflops") * 1e12
    shares = section.section("efficiency", None)
    # a key of another type has no order among sizes, and true is an int
    if not shares.names or not all(type(size) is int and size > 0 for size in shares.names):
        raise Refused(f"{section.place}: efficiency maps sizes of a product's smallest dimension to shares")
    sizes = sorted(shares.names)
    return Gemm(peak, tuple(sizes), tuple(peak * shares.share(size) for size in sizes))


def _rate(section: "_Section") -> float:
    return section.number("peak_gb_per_s") * 1e9 * section.share("efficiency")


def _of_rank(top: "_Section", ranks_per_node: int) -> float:
    """Return a rank's share of its node's disks."""
    if not top.has("ranks_per_node"):
        raise Refused(f"{top.section('disk', DISK_KEYS).place}: the disks are those of a node; give ranks_per_node too")
    return _rate(top.section("disk", DISK_KEYS)) / ranks_per_node


def _elementwise(memory: "_Section") -> float | None:
    """Return the rate of fused passes as a share of the memory's peak, or that measured on unfused ones."""
    if memory.has("elementwise_efficiency") and memory.has("elementwise_gb_per_s"):
        raise Refused(f"{memory.place}: give memory.elementwise_efficiency or memory.elementwise_gb_per_s, not both")
    if memory.has("elementwise_efficiency"):
        return memory.number("peak_gb_per_s") * 1e9 * memory.share("elementwise_efficiency")
    return memory.optional("elementwise_gb_per_s", 1e9)


def _link(section: "_Section") -> Link:
    return Link(
        bytes_per_s=_rate(section),
        latency_s=section.number("latency_us", zero=True) * 1e-6,
        ports=section.word("ports", PORTS),
        busy_s_per_byte=section.optional("busy_s_per_gb", 1e-9, 0.0),
        busy_s_per_message=section.optional("busy_us_per_message", 1e-6, 0.0),
        pair_bytes_per_s=section.optional("pair_gb_per_s", 1e9),
        gather_bytes_per_s=section.optional("gather_gb_per_s", 1e9),
        scatter_bytes_per_s=section.optional("scatter_gb_per_s", 1e9),
        reduce_bytes_per_s=section.optional("reduce_gb_per_s", 1e9),
    )


class _Section:
    """A mapping of the file with the lines of its values, merged over one of the file that it extends."""

    def __init__(self, file: Path, path: str, content: Any, keys: tuple[str, ...] | None, line: int = 1) -> None:
        self._file, self._path, self._content, self._line = file, path, content, line
        self.below: _Section | None = None
        for key in content:
            if keys is not None and key not in keys:
                raise unknown("key", f"{path}{key}", [f"{path}{known}" for known in keys], self._at(key))

    @property
    def place(self) -> str:
        """File and line of its key."""
        return f"{self._file}:{self._line}"

    @property
    def names(self) -> list[Any]:
        """Keys of this mapping and of the one below."""
        return list(dict.fromkeys([*(self.below.names if self.below else ()), *self._content]))

    def has(self, key: Any) -> bool:
        """True if there is a value; `key:` without a value removes an inherited one."""
        if key in self._content:
            return self._content[key] is not None
        return self.below is not None and self.below.has(key)

    def section(self, key: str, keys: str | None) -> "_Section":
        """Return the mapping under a key; `keys` are the allowed ones, None for any."""
        below = self.below.section(key, keys) if self.below and self.below.has(key) else None
        if below and key not in self._content:
            return below
        value = self._value(key, "a mapping")
        if not isinstance(value, Mapping):
            raise Refused(f"{self._at(key)}: {self._path}{key} must be a mapping, got {value!r}")
        known = None if keys is None else tuple(keys.split())
        own = _Section(self._file, f"{self._path}{key}.", value, known, self._content.lc.key(key)[0] + 1)
        own.below = below
        return own

    def number(self, key: Any, *, zero: bool = False) -> float:
        """Return a positive number, or with `zero` one of at least 0."""
        if self.below and key not in self._content:
            return self.below.number(key, zero=zero)
        value = self._value(key, "a number")
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not 0 <= value < LIMIT or (value == 0 and not zero):
            rule = "a number of 0 or more" if zero else "a positive number"
            rule = f"below {LIMIT:g}" if good and value >= LIMIT else rule
            raise Refused(f"{self._at(key)}: {self._path}{key} must be {rule}, got {value!r}")
        return float(value)

    @overload
    def optional(self, key: str, unit: float) -> float | None: ...

    @overload
    def optional(self, key: str, unit: float, default: float) -> float: ...

    def optional(self, key: str, unit: float, default: float | None = None) -> float | None:
        """Return a number in `unit`, or `default` where there is none; with a default, 0 is allowed."""
        return self.number(key, zero=default is not None) * unit if self.has(key) else default

    def count(self, key: str) -> int:
        """Return a positive whole number."""
        if self.below and key not in self._content:
            return self.below.count(key)
        value = self.number(key)
        if not value.is_integer():
            raise Refused(f"{self._at(key)}: {self._path}{key} must be a whole number, got {value:g}")
        return int(value)

    def share(self, key: Any) -> float:
        """Return a number above 0 and at most 1."""
        if self.below and key not in self._content:
            return self.below.share(key)
        value = self.number(key)
        if value > 1:
            raise Refused(f"{self._at(key)}: {self._path}{key} must be a share of the peak, at most 1, got {value!r}")
        return value

    def word(self, key: str, known: tuple[str, ...]) -> str:
        """Return one of the known words."""
        if self.below and key not in self._content:
            return self.below.word(key, known)
        value = self._value(key, f"one of: {', '.join(known)}")
        if value not in known:
            raise Refused(
                f"{self._at(key)}: {self._path}{key} must be one of: {', '.join(known)}; got {value!r}"
                f"{suggest(str(value), known)}"
            )
        return str(value)

    def _value(self, key: Any, what: str) -> Any:
        if key not in self._content:
            raise Refused(f"{self._file}:{self._line}: {self._path}{key} is missing; give {what}")
        return self._content[key]

    def _at(self, key: Any) -> str:
        return f"{self._file}:{self._content.lc.key(key)[0] + 1}"
