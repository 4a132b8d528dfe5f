"""Set environment variables of a rank that torchrun would have set and that Megatron insists on."""

import re
from collections.abc import Sequence

import torch

from megatron_cp import config
from megatron_cp.megatron.run import say, values_of

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


def environment_for_gpus(argv: Sequence[str]) -> None:
    """Set CUDA_DEVICE_MAX_CONNECTIONS=1 where Megatron insists on it and the user has not said otherwise.

    Must come before CUDA is initialised: the driver reads it once.
    """
    flags = ("--tensor-model-parallel-size", "--context-parallel-size")
    sizes = [values_of(argv, flag) or ["1"] for flag in flags]
    sharded = any(flag in argv for flag in ("--use-torch-fsdp2", "--use-megatron-fsdp"))
    if torch.cuda.device_count() and any(size != ["1"] for size in sizes) and not sharded:
        filled = config.set_missing({"CUDA_DEVICE_MAX_CONNECTIONS": "1"})
        if filled:
            say("CUDA_DEVICE_MAX_CONNECTIONS=1, which tensor and context parallelism need")
