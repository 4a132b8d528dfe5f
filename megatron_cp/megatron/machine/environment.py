"""Set environment variables of a rank that torchrun would have set and that Megatron insists on."""

import re
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from megatron_cp import config
from megatron_cp.comm import objects_of_all
from megatron_cp.errors import Refused
from megatron_cp.megatron.machine.facts import major_capability
from megatron_cp.megatron.run import say, values_of
from megatron_cp.tensor import SYMMETRIC

# srun starts the processes itself: what torchrun would have set, and SLURM's name for it
FROM_SLURM = {
    "RANK": "SLURM_PROCID",
    "WORLD_SIZE": "SLURM_NTASKS",
    "LOCAL_RANK": "SLURM_LOCALID",
    "LOCAL_WORLD_SIZE": "SLURM_NTASKS_PER_NODE",
}


def environment_from_slurm() -> None:
    """Set what torchrun would have set, where srun started this process; what is set already stays."""
    if config.variable("RANK") or not config.variable("SLURM_PROCID"):
        return
    values = {name: config.variable(source) for name, source in FROM_SLURM.items() if config.variable(source)}
    nodes = config.variable("SLURM_STEP_NODELIST") or config.variable("SLURM_JOB_NODELIST")
    values["MASTER_ADDR"] = first_host(nodes) if nodes else "127.0.0.1"
    # jobs that share a node get different ports
    values["MASTER_PORT"] = str(20000 + int(config.variable("SLURM_JOB_ID", "0")) % 20000)
    filled = config.set_missing(values)
    say(f"from SLURM: {' '.join(f'{name}={value}' for name, value in sorted(filled.items()))}")


def first_host(nodes: str) -> str:
    """Return the first name of a SLURM node list such as `gpu[03-04,7],login1`."""
    prefix, _, rest = nodes.partition("[")
    if not rest or "," in prefix:
        return prefix.split(",")[0]
    numbers, _, tail = rest.partition("]")
    return prefix + re.split("[-,]", numbers)[0] + tail.split(",")[0]


FSDP = ("--use-torch-fsdp2", "--use-megatron-fsdp")
BLACKWELL = 10


def environment_for_gpus(argv: Sequence[str]) -> None:
    """Set CUDA_DEVICE_MAX_CONNECTIONS=1 where Megatron insists on it and the user has not said otherwise.

    It insists before Blackwell, with tensor or context parallelism, unless FSDP or the overlap of the experts' messages
    is asked for, which want more connections, as --tp-engine symmetric does. Must come before CUDA is initialised: the
    driver reads it once.
    """
    flags = ("--tensor-model-parallel-size", "--context-parallel-size")
    sizes = [values_of(argv, flag) or ["1"] for flag in flags]
    if not torch.cuda.device_count():
        return
    wants_more = any(flag in argv for flag in (*FSDP, "--overlap-moe-expert-parallel-comm")) or copies_beside(argv)
    if any(size != ["1"] for size in sizes) and not wants_more and (major_capability() or 0) < BLACKWELL:
        filled = config.set_missing({"CUDA_DEVICE_MAX_CONNECTIONS": "1"})
        if filled:
            say("CUDA_DEVICE_MAX_CONNECTIONS=1, which tensor and context parallelism need")
    if values_of(argv, "--pp-schedule") is not None and (missing := advised_for_receives()):
        say(f"--pp-schedule posts receives early: set {' and '.join(missing)} (docs/gpu.md)")


def refuse_mixed_gpus() -> None:
    """Raise ValueError on all ranks where they run on GPUs of several models; all processes of the run call it."""
    if not dist.is_initialized():
        return
    models = objects_of_all(torch.cuda.get_device_name())
    if len(set(models)) == 1:
        return
    held = ", ".join(f"{model} on rank {models.index(model)}" for model in dict.fromkeys(models))
    raise Refused(f"all ranks must run on GPUs of one model, got {held}; use equal GPUs")


def copies_beside(argv: Sequence[str]) -> bool:
    """True if linears copy on a second stream beside their products, which one connection would hold up."""
    return values_of(argv, "--tp-engine") == [SYMMETRIC]


def without_one_connection(old: Callable[[], int]) -> int:
    """Return the device's architecture to Megatron's checks, Blackwell's for earlier ones: they then demand nothing."""
    return max(old(), BLACKWELL)


def advised_for_receives() -> list[str]:
    """Return the settings, as NAME=VALUE, that this process lacks and a schedule with receives in flight should have.

    A receive that waits for its message keeps the device busy. An allocator that frees memory to make room, and a
    kernel that is loaded at its first call, wait for all of the device, and so for a message that may depend on this
    rank.
    """
    allocator = config.variable("PYTORCH_ALLOC_CONF") or config.variable("PYTORCH_CUDA_ALLOC_CONF")
    missing = [] if "expandable_segments:True" in allocator else ["PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"]
    eager = config.variable("CUDA_MODULE_LOADING") == "EAGER"
    return missing if eager else [*missing, "CUDA_MODULE_LOADING=EAGER"]
