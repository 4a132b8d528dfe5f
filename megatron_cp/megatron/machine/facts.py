"""Facts about a machine that our checks and the values filled in for it depend on."""

import ctypes
import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A machine as the checks see it: the one that they run on, or another one that a run is meant for.

    gpu:    torch.cuda has a device, and the CPU does not stand in for it
    te:     transformer-engine is installed
    nvrx:   nvidia-resiliency-ext is installed, with which Megatron saves asynchronously unless told otherwise
    inputs: data and checkpoints can be read on the machine where the checks run
    """

    gpu: bool = True
    te: bool = True
    nvrx: bool = True
    inputs: bool = True


def this_machine() -> Machine:
    """Look at this machine; of the packages, only torch is imported to find out."""
    from megatron_cp.megatron.machine import cpu

    return Machine(gpu=not cpu.active(), te=installed("transformer_engine"), nvrx=installed("nvidia_resiliency_ext"))


def device_of_run() -> str:
    """Return "cuda" or "cpu", where a model will run; while it is built it may be elsewhere."""
    from megatron_cp.megatron.machine import cpu

    return "cpu" if cpu.needed() or cpu.active() else "cuda"


def major_capability() -> int | None:
    """Return the major compute capability of the first GPU, None where it cannot be told.

    Asks NVML: a question to CUDA would initialise it, and with it fix the settings that it reads once.
    """
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    failed = (
        library.nvmlInit_v2()
        or library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device))
        or library.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor))
    )
    return None if failed else major.value


def installed(package: str) -> bool:
    """True if the package can be imported; it is not."""
    return importlib.util.find_spec(package) is not None
