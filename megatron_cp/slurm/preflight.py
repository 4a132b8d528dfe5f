"""Check the nodes of a job before it starts, and find those that differ from the others.

Every node examines itself and writes a report into the job's folder, which shows that the folder is shared and
writable. One process then reads all reports and names the nodes that fail, differ, or sent no report.
"""

import contextlib
import importlib.util
import ipaddress
import json
import os
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import psutil

from megatron_cp import config
from megatron_cp.findings import Finding, Status, guarded, installed

GIB = 2**30
SHARED_MEMORY = Path("/dev/shm")
# NCCL keeps its buffers between the GPUs of a node there
SHARED_MEMORY_GIB = 1
# a GPU with a smaller share of free memory is used by another job
FREE_OF_GPU = 0.9
# a rank computes in one thread and reads data in another
CPUS_PER_GPU = 2
# libraries, pinned buffers and data of a rank
GIB_PER_GPU = 8
CGROUPS = Path("/sys/fs/cgroup")
# nodes start their check within seconds of each other
SECONDS_APART = 120
# seconds for which NFS may show an old folder to another node
PATIENCE_SECONDS = 35
# share of the median node's memory
LEAST_MEMORY = 0.9
PACKAGES = ("torch", "megatron-core", "megatron-cp", "transformer-engine", "flash-attn", "apex")


class Wanted(NamedTuple):
    """Requirements of a node: GPUs, free bytes in the folder, and an address of the first node that must resolve."""

    gpus: int
    free_bytes: int
    folder: Path
    master_addr: str


class NodeReport(NamedTuple):
    """A node's report on itself; `facts` must be equal on all nodes, memory and clock nearly equal."""

    node: str
    clock: float
    memory: int
    facts: dict[str, str]
    findings: list[Finding]


def name() -> str:
    """Return SLURM's name of this node, or else its host name."""
    return config.variable("SLURMD_NODENAME") or socket.gethostname()


def examine(wanted: Wanted) -> NodeReport:
    """Examine this node; every failure becomes a finding."""
    looks: tuple[Callable[[], Iterator[Finding]], ...] = (
        lambda: _gpus(wanted.gpus),
        lambda: _cpus(wanted.gpus),
        lambda: _memory(wanted.gpus),
        lambda: _shared_memory(wanted.gpus),
        lambda: _disk(wanted),
        lambda: _address(wanted.master_addr),
        _own_address,
        _grace,
    )
    subjects = (
        "GPUs",
        "CPUs",
        "memory",
        "shared memory",
        "disk",
        "address of the first node",
        "own address",
        "torchrun",
    )
    findings = [finding for subject, look in zip(subjects, looks, strict=True) for finding in guarded(subject, look)]
    return NodeReport(name(), time.time(), psutil.virtual_memory().total, _facts(wanted.gpus), findings)


def _gpus(wanted: int) -> Iterator[Finding]:
    """Run one operation on each GPU, because a broken one may still be listed."""
    if not wanted:
        yield Finding("GPUs", "ok", "none required")
        return
    import torch

    usable = torch.cuda.device_count()
    yield Finding(
        "GPUs",
        "ok" if usable >= wanted else "broken",
        f"{usable} of {wanted} usable",
        "" if usable >= wanted else "look at nvidia-smi on this node, or ask SLURM for as many as the recipe uses",
    )
    for index in range(min(usable, wanted)):
        torch.ones(1, device=f"cuda:{index}").item()
        free, total = torch.cuda.mem_get_info(index)
        fine = free >= FREE_OF_GPU * total
        yield Finding(
            f"GPU {index}",
            "ok" if fine else "broken",
            f"{free / GIB:.1f} of {total / GIB:.1f} GiB free",
            "" if fine else "end the processes that an earlier job left on it",
        )


def _cpus(gpus: int) -> Iterator[Finding]:
    """Count the CPUs that this job's step may use: SLURM may have bound it to one."""
    count = len(os.sched_getaffinity(0))
    status: Status = "ok" if count >= CPUS_PER_GPU * gpus else "optional" if count >= gpus else "broken"
    remedy = "a rank computes and loads data at the same time: ask for --cpus-per-task N or --exclusive"
    yield Finding("CPUs", status, f"{count} may be used by {gpus} ranks", "" if status == "ok" else remedy)


def _memory(gpus: int) -> Iterator[Finding]:
    """Compare the limit of the step's control group with the node's memory."""
    total, limit = psutil.virtual_memory().total, memory_limit(Path("/proc/self/cgroup"), CGROUPS)
    granted = min(total, limit or total)
    status: Status = "ok" if granted >= total / 2 or not gpus else "optional"
    if granted < GIB_PER_GPU * GIB * gpus:
        status = "broken"
    remedy = "a rank needs host memory for its libraries, pinned buffers and data: ask for --mem 0 or --mem SIZE"
    found = f"{granted / GIB:.1f} of {total / GIB:.1f} GiB may be used"
    yield Finding("memory", status, found, "" if status == "ok" else remedy)


def memory_limit(of_process: Path, mounted: Path) -> int | None:
    """Return the smallest limit, in bytes, of a process's control groups and those above them; None without one.

    of_process: file such as /proc/self/cgroup
    mounted:    folder such as /sys/fs/cgroup, of version 2, or of version 1 with a folder for each controller
    """
    found: list[int] = []
    for line in of_process.read_text().splitlines() if of_process.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = mounted / "memory" if controllers else mounted
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        group = Path(path.lstrip("/"))
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):
                found.append(int((root / folder / name).read_text()))
    return min(found, default=None)


def _shared_memory(gpus: int) -> Iterator[Finding]:
    free = shutil.disk_usage(SHARED_MEMORY).free / GIB
    fine = free >= SHARED_MEMORY_GIB or not gpus
    remedy = f"NCCL needs {SHARED_MEMORY_GIB} GiB; empty it, or give the container more with --shm-size"
    yield Finding(str(SHARED_MEMORY), "ok" if fine else "broken", f"{free:.2f} GiB free", "" if fine else remedy)


def _disk(wanted: Wanted) -> Iterator[Finding]:
    free = shutil.disk_usage(wanted.folder).free
    fine = free >= wanted.free_bytes
    yield Finding(
        "disk",
        "ok" if fine else "broken",
        f"{free / 1e9:.1f} GB free in {wanted.folder}",
        "" if fine else f"{wanted.free_bytes / 1e9:.1f} GB are required: free some, or lower --node-free-gb",
    )


def _address(address: str) -> Iterator[Finding]:
    """Check that the rendezvous address resolves here, and on the first node, that it is the node's own."""
    if not address:
        return
    subject = "address of the first node"
    resolved = _resolved(address)
    if not resolved:
        remedy = (
            "ranks could not connect: set NodeAddr in slurm.conf to a name that resolves, or repair DNS or /etc/hosts"
        )
        yield Finding(subject, "broken", f"{address} does not resolve", remedy)
    elif config.variable("SLURM_NODEID") == "0" and not resolved & _own_addresses():
        remedy = "set NodeAddr in slurm.conf to an address that this node has"
        yield Finding(subject, "broken", f"{address} is not an address of this node", remedy)
    else:
        yield Finding(subject, "ok", f"{address} is {', '.join(sorted(resolved))}")


def _own_address() -> Iterator[Finding]:
    """Check the address of the host's name, on which gloo listens; Megatron uses it beside NCCL."""
    host, interface = socket.gethostname(), config.variable("GLOO_SOCKET_IFNAME")
    if interface:
        fine = interface in psutil.net_if_addrs()
        found = f"GLOO_SOCKET_IFNAME={interface}" + ("" if fine else ", which this node does not have")
    else:
        resolved = _resolved(host)
        alone = config.variable("SLURM_JOB_NUM_NODES", "1") == "1"
        fine = alone or (bool(resolved) and not all(ipaddress.ip_address(text).is_loopback for text in resolved))
        found = f"{host} is {', '.join(sorted(resolved)) or 'not resolved'}"
    remedy = (
        "other nodes cannot reach gloo there: set GLOO_SOCKET_IFNAME in ENV_VARS to an interface that all nodes have"
    )
    yield Finding("own address", "ok" if fine else "broken", found, "" if fine else remedy)


def _grace() -> Iterator[Finding]:
    """Check that this torch lets torchrun wait for ranks that are saving."""
    seconds = config.variable("TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    if not seconds:
        return
    # reading is quicker than importing
    torch = importlib.util.find_spec("torch")
    source = Path(str(torch and torch.origin)).parent / "distributed" / "launcher" / "api.py"
    fine = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in source.read_text("utf-8")
    yield Finding(
        "torchrun",
        "ok" if fine else "optional",
        f"waits {seconds if fine else 30} s for ranks that save",
        "" if fine else "this torch cannot wait longer; if saving takes longer, use --launcher srun",
    )


def _resolved(host: str) -> set[str]:
    try:
        return {str(found[4][0]).partition("%")[0] for found in socket.getaddrinfo(host, None)}
    except OSError:
        return set()


def _own_addresses() -> set[str]:
    return {found.address.partition("%")[0] for several in psutil.net_if_addrs().values() for found in several}


def _facts(gpus: int) -> dict[str, str]:
    """Return versions, which must be equal on all nodes of a job."""
    facts = {"Python": sys.version.split()[0]} | {package: installed(package) or "none" for package in PACKAGES}
    driver = Path("/sys/module/nvidia/version")
    facts["NVIDIA driver"] = driver.read_text().strip() if driver.is_file() else "none"
    if gpus:
        import torch

        facts["NCCL"] = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "none"
        facts["GPU"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return facts


def write(report: NodeReport, folder: Path) -> None:
    """Write the report into the folder that all nodes share; raises OSError where this node cannot write."""
    findings = [finding._asdict() for finding in report.findings]
    (folder / f"{report.node}.json").write_text(json.dumps({**report._asdict(), "findings": findings}), "utf-8")


def read(folder: Path, nodes: Sequence[str], patience: float = PATIENCE_SECONDS) -> dict[str, NodeReport]:
    """Return the reports of those `nodes` that wrote one, after waiting up to `patience` seconds for late files."""
    deadline = time.monotonic() + patience
    while True:
        found = {node: report for node in nodes if (report := _report(folder / f"{node}.json"))}
        if len(found) == len(nodes) or time.monotonic() > deadline:
            return found
        time.sleep(0.5)


def _report(path: Path) -> NodeReport | None:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return NodeReport(**{**content, "findings": [Finding(**finding) for finding in content["findings"]]})


def verdict(reports: Mapping[str, NodeReport], nodes: Sequence[str]) -> dict[str, list[str]]:
    """Return reasons and remedies for each of `nodes` that a job should not start on; empty if all are fine."""
    known = [reports[node] for node in nodes if node in reports]
    bad = {node: list(_wrong_with(reports.get(node), known)) for node in nodes}
    return {node: reasons for node, reasons in bad.items() if reasons}


def _wrong_with(report: NodeReport | None, all_reports: Sequence[NodeReport]) -> Iterator[str]:
    if report is None:
        yield "no report -> its check failed or hangs, or --save is another folder there; see the output of srun above"
        return
    for finding in report.findings:
        if finding.status == "broken":
            yield f"{finding.subject}: {finding.found} -> {finding.remedy}"
    for fact, here in report.facts.items():
        there, _ = Counter(other.facts.get(fact, "none") for other in all_reports).most_common(1)[0]
        if here != there:
            remedy = "ask SLURM for nodes with one model" if fact == "GPU" else "install the same on all nodes"
            yield f"{fact}: {here}, elsewhere {there} -> {remedy}"
    usual = median(other.memory for other in all_reports)
    if report.memory < LEAST_MEMORY * usual:
        yield f"memory: {report.memory / GIB:.0f} GiB, elsewhere {usual / GIB:.0f} GiB -> look for a failed module"
    apart = abs(report.clock - median(other.clock for other in all_reports))
    if apart > SECONDS_APART:
        yield f"clock: {apart:.0f} s off the others -> synchronise it, or find out why the node is so slow"
