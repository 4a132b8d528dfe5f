"""The device: its versions, its queues, and the memory of its communicators."""

import platform
from collections.abc import Iterator
from importlib import metadata

import torch

from gpu_check.steps import LeftOut
from gpu_check.table import Row

PACKAGES = (
    "megatron-core transformer-engine flash-attn flash-attn-4 triton jaxtyping ruamel.yaml beartype numpy".split()
)


def title(device: str) -> str:
    """Name the device and torch, without touching CUDA in this process."""
    if device == "cuda":
        import subprocess

        asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        try:
            answer = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            answer = "a CUDA GPU"
        return f"{answer}; torch {torch.__version__}"
    return f"CPU, {platform.machine()}, {torch.get_num_threads()} threads; torch {torch.__version__}"


def versions(device: str) -> Iterator[Row]:
    """Name the versions of everything that a figure may depend on, and the packages that are missing."""
    yield Row("python, torch", {"python": platform.python_version(), "torch": torch.__version__})
    if device == "cuda":
        facts = torch.cuda.get_device_properties(0)
        memory = facts.total_memory / 2**30
        found = {"": facts.name, "capability": f"{facts.major}.{facts.minor}", "GiB": memory}
        yield Row("device", {**found, "SMs": facts.multi_processor_count})
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        yield Row("libraries", {"CUDA": str(torch.version.cuda), "cuDNN": torch.backends.cudnn.version(), "NCCL": nccl})
    else:
        yield Row("device", {"": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()})
    for package in PACKAGES:
        try:
            yield Row(package, {"": metadata.version(package)})
        except metadata.PackageNotFoundError:
            yield Row(package, {"": "not installed"}, "left out")


def queue(device: str) -> Iterator[Row]:
    """Launch on A, behind it on A, and then on B: does B start before A's second kernel?

    With one hardware queue it does not (CUDA_DEVICE_MAX_CONNECTIONS=1): a launch that has to wait holds up all later
    ones. The model of NCCL's rules in the tests rests on it.
    """
    if device != "cuda":
        raise LeftOut("needs a CUDA GPU: queues of launches")
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    spin = 200_000_000
    x = torch.zeros(1, device="cuda")
    for _ in range(2):
        torch.cuda.synchronize()
        with torch.cuda.stream(first):
            events[0].record()
            torch.cuda._sleep(spin)
            torch.cuda._sleep(spin)
            events[1].record()
        with torch.cuda.stream(second):
            x.add_(1)
            events[2].record()
        torch.cuda.synchronize()
    both, other = events[0].elapsed_time(events[1]), events[0].elapsed_time(events[2])
    held = other > both / 4
    yield Row("a launch behind one that waits", {"both on A, ms": both, "B's end, ms": other, "B waited": str(held)})


def communicators(device: str) -> Iterator[Row]:
    """Measure the device memory of NCCL's communicators with one rank, the least that one can take."""
    if device != "cuda":
        raise LeftOut("needs a CUDA GPU: memory of communicators")
    import torch.distributed as dist

    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    x = torch.ones(1 << 20, device="cuda")
    torch.cuda.synchronize()
    start = torch.cuda.mem_get_info()[0]
    made = 0
    for count in (1, 4, 16):
        while made < count:
            dist.all_reduce(x, group=dist.new_group([0]))
            made += 1
        torch.cuda.synchronize()
        used = (start - torch.cuda.mem_get_info()[0]) / 2**20
        yield Row(f"{count} groups of one rank", {"MiB": used, "MiB each": used / count})
    dist.destroy_process_group()
