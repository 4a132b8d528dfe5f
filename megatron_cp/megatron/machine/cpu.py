"""Run unmodified megatron.training where there is no accelerator: torch.cuda answers for the CPU.

Megatron allocates with `device="cuda"`, asks torch.cuda for streams, events and random states, and refuses to start
where there is no CUDA device. `cpu_runtime()` replaces the names in REPLACEMENTS by ones that do the same on the CPU
while the context is open; leaving it restores each of them, and `torch.cuda.is_available()` is False again.
On a machine with a GPU it does nothing. Importing this file changes nothing.

Communication goes over gloo. Streams are in order and events take their time from the host's clock. The "GPU's" random
generator is the CPU's default one, so Megatron's random-state tracker keeps its meaning. Memory figures are the
process's resident set, which is what the CPU run really costs.
"""

import contextlib
import functools
import logging
import os
import resource
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import psutil
import torch

from megatron_cp.megatron.machine.uneven import gathered_unevenly, scattered_unevenly
from megatron_cp.megatron.rebind import Replaced, replace, restore_all


class Replacement(NamedTuple):
    """Names to rebind, a function from the old value to the new one, and the reason."""

    targets: tuple[str, ...]
    make: Callable[[Any], Any]
    reason: str


class Stream:
    """Stand-in for a CUDA stream: work is complete when the call that issues it returns."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = torch.device("cpu")

    def synchronize(self) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: "ClockEvent | None" = None) -> "ClockEvent":
        event = event or ClockEvent()
        event.record(self)
        return event

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)


class ClockEvent:
    """Stand-in for a CUDA event, which records the host's time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seconds = 0.0

    def record(self, stream: Any = None) -> None:
        self._seconds = time.perf_counter()

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "ClockEvent") -> float:
        """Return the milliseconds from this event to `end`."""
        return 1e3 * (end._seconds - self._seconds)


def peak_resident_bytes() -> int:
    """Return the peak resident memory of this process."""
    # Linux counts ru_maxrss in KiB, and not always up to the last page
    return max(resident_bytes(), 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


def _memory_stats(device: Any = None) -> dict[str, int]:
    now, peak = resident_bytes(), peak_resident_bytes()
    return {
        "allocated_bytes.all.current": now,
        "allocated_bytes.all.peak": peak,
        "reserved_bytes.all.current": now,
        "reserved_bytes.all.peak": peak,
        "allocation.all.current": 0,
        "num_alloc_retries": 0,
    }


def _device_properties(device: Any = None) -> SimpleNamespace:
    # 10: Megatron asks for CUDA_DEVICE_MAX_CONNECTIONS below that, which means nothing here
    return SimpleNamespace(
        name="cpu",
        major=10,
        minor=0,
        total_memory=psutil.virtual_memory().total,
        multi_processor_count=os.cpu_count() or 1,
    )


def _means_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    # a bare number is a CUDA device's index to torch
    return isinstance(device, int) or (isinstance(device, str) and device.startswith("cuda"))


def _device_keyword_to_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs and _means_cuda(kwargs["device"]):
            kwargs["device"] = "cpu"
        # pinning memory asks for a CUDA driver
        kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return on_cpu


def _to_on_cpu(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _means_cuda(args[0]):
            args = ("cpu", *args[1:])
        if "device" in kwargs and _means_cuda(kwargs["device"]):
            kwargs["device"] = "cpu"
        return method(self, *args, **kwargs)

    return to


def _type_of_cuda(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return method(self, *args, **kwargs)
        return method(self).replace("torch.", "torch.cuda.", 1)

    return type_


def _to_host_memory(_: Any) -> Callable[..., Any]:
    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    return maybe_move_tensor_to_cpu


def _mesh_on_cpu(from_group: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(from_group)
    def on_cpu(group: Any, device_type: str, *args: Any, **kwargs: Any) -> Any:
        return from_group(group, "cpu" if _means_cuda(device_type) else device_type, *args, **kwargs)

    return on_cpu


def _call_now(_: Any) -> Callable[..., Any]:
    return lambda function, *args, **kwargs: function()


def _same_tensor(_: Any) -> Callable[..., Any]:
    return lambda tensor, *args, **kwargs: tensor


def _unpinned(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def init(*args: Any, **kwargs: Any) -> None:
        function(*args, **{**kwargs, "pin_memory": False})

    return init


def _forked_writer(_: Any) -> Callable[..., Any]:
    def _get_async_caller(self: Any) -> Any:
        from megatron.core.dist_checkpointing.strategies.async_utils import TemporalAsyncCaller

        # one at a time: the writers of a rank answer through one queue, and the first answer counts for the first save
        self.maybe_finalize_async_calls(blocking=True)
        return TemporalAsyncCaller()

    return _get_async_caller


def _answer(value: Any) -> Callable[[Any], Any]:
    return lambda _: lambda *args, **kwargs: value


def _use(function: Any) -> Callable[[Any], Any]:
    return lambda _: function


def _cuda(*names: str) -> tuple[str, ...]:
    return tuple(f"torch.cuda:{name}" for name in names)


FACTORIES = """
arange as_tensor empty empty_like empty_strided eye full full_like linspace ones ones_like rand rand_like randint
randint_like randn randn_like randperm tensor tril_indices triu_indices zeros zeros_like
"""
WRITERS = "megatron.core.dist_checkpointing.strategies.async_utils:AsyncCallsQueue"
NEW_METHODS = "new_empty new_full new_ones new_tensor new_zeros"

REPLACEMENTS = (
    Replacement(_cuda("is_available"), _answer(True), "initialize_megatron refuses to start without CUDA"),
    Replacement(_cuda("device_count"), _answer(1), "the random-state trackers are seeded only where there is a device"),
    Replacement(_cuda("current_device"), _answer(0), "Megatron allocates on the current device"),
    Replacement(_cuda("set_device", "set_stream"), _answer(None), "there is one device, one queue"),
    Replacement(_cuda("synchronize", "empty_cache"), _answer(None), "the CPU is always synchronous and caches nothing"),
    Replacement(
        ("torch.accelerator:current_accelerator",),
        _answer(None),
        "torch's own optimizers and loaders must see that there is none",
    ),
    Replacement(_cuda("manual_seed_all"), _answer(None), "torch.manual_seed calls it, and would queue it without end"),
    Replacement(
        _cuda("manual_seed"), _use(lambda seed: torch.default_generator.manual_seed(int(seed))), "the CPU's generator"
    ),
    Replacement(
        (*_cuda("get_rng_state"), "torch.cuda.random:get_rng_state"),
        _use(lambda device=None: torch.default_generator.get_state()),
        "the tracker and the checkpoint read it",
    ),
    Replacement(
        (*_cuda("set_rng_state"), "torch.cuda.random:set_rng_state"),
        _use(lambda new_state, device=None: torch.default_generator.set_state(new_state)),
        "the checkpoint sets it",
    ),
    Replacement(
        _cuda("default_generators"),
        lambda _: (torch.default_generator,),
        "the tracker sets its state on the device's generator",
    ),
    Replacement(
        ("megatron.core.tensor_parallel.random:_lazy_call",),
        _call_now,
        "what waits for CUDA's initialisation would never be called, and dropout would not follow the tracker",
    ),
    Replacement(
        ("megatron.training.initialize:_warmup_jit_function",),
        _answer(None),
        "draws tensors whose sizes follow CP, TP and micro batch from the generator that then initialises the weights",
    ),
    Replacement(_cuda("Stream"), _use(Stream), "side streams of DDP, dispatchers and pipelines"),
    Replacement(_cuda("Event"), _use(ClockEvent), "timers and dispatchers record events"),
    Replacement(_cuda("current_stream", "default_stream"), lambda _: _one_stream(), "compared with side streams"),
    Replacement(_cuda("stream"), _use(lambda stream: contextlib.nullcontext(stream)), "there is one queue"),
    Replacement(
        _cuda("device"),
        _use(lambda device: contextlib.nullcontext(device)),
        "transformer-engine before 2.10 sets its input's device, which torch.cuda refuses where it is the CPU",
    ),
    Replacement(
        _cuda("is_current_stream_capturing"),
        _answer(False),
        "torch's optimizers ask at each step, torch 2.8 the driver",
    ),
    Replacement(_cuda("get_device_properties"), _use(_device_properties), "validate_args asks for the architecture"),
    Replacement(_cuda("get_device_capability"), _answer((10, 0)), "the same question"),
    Replacement(_cuda("get_device_name"), _answer("cpu"), "logged"),
    Replacement(
        _cuda("memory_allocated", "memory_reserved", "device_memory_used"),
        _use(lambda device=None: resident_bytes()),
        "the memory report would print zeros",
    ),
    Replacement(
        _cuda("max_memory_allocated", "max_memory_reserved"),
        _use(lambda device=None: peak_resident_bytes()),
        "the memory report would print zeros",
    ),
    Replacement(_cuda("memory_stats"), _use(_memory_stats), "written to TensorBoard"),
    Replacement(_cuda("reset_peak_memory_stats"), _answer(None), "a process's peak cannot be reset"),
    Replacement(
        tuple(f"torch.cuda.nvtx:{name}" for name in ("range_push", "range_pop", "mark")),
        _answer(None),
        "profiling marks need CUDA",
    ),
    Replacement(
        tuple(f"torch:{name}" for name in FACTORIES.split()), _device_keyword_to_cpu, "allocations say device='cuda'"
    ),
    Replacement(tuple(f"torch:Tensor.{name}" for name in NEW_METHODS.split()), _device_keyword_to_cpu, "the same"),
    Replacement(("torch:Tensor.to",), _to_on_cpu, "moves to the device"),
    Replacement(("torch:Tensor.cuda", "torch:Tensor.pin_memory"), _same_tensor, "moves to the device"),
    Replacement(("torch:Tensor.record_stream",), _answer(None), "lifetime on side streams"),
    Replacement(("torch:Tensor.type",), _type_of_cuda, "optimizers sort parameters by the name torch.cuda.FloatTensor"),
    Replacement(
        ("torch.utils.data:DataLoader.__init__",), _unpinned, "pinned memory is CUDA's; torch warns at each iterator"
    ),
    Replacement(
        (
            "megatron.core.transformer.moe.moe_utils:maybe_move_tensor_to_cpu",
            "megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu",
        ),
        _to_host_memory,
        "gives split sizes as integers only for CUDA tensors, and all_to_all takes no tensors for them",
    ),
    Replacement(
        ("torch.distributed:all_gather",),
        gathered_unevenly,
        "expert tensor parallelism gathers different numbers of tokens, and gloo equal ones alone",
    ),
    Replacement(
        ("torch.distributed:reduce_scatter",),
        scattered_unevenly,
        "adds up outputs in the same numbers, which not every version of gloo does",
    ),
    Replacement(
        ("torch.distributed.device_mesh:DeviceMesh.from_group",),
        _mesh_on_cpu,
        "torch's sharded data parallelism makes a mesh of CUDA devices",
    ),
    Replacement(
        (f"{WRITERS}.warmup_persistent_caller",),
        _answer(None),
        "the process that writes checkpoints ends when it asks for its device, and its rank would wait without end",
    ),
    Replacement(
        (f"{WRITERS}._get_async_caller",),
        _forked_writer,
        "a forked writer has the tensors as they are now; the other one would share those that training changes",
    ),
)


def _one_stream() -> Callable[..., Stream]:
    stream = Stream()
    return lambda *args, **kwargs: stream


def _not_about_generators(record: logging.LogRecord) -> bool:
    # the two generators are one here, so the tracker's warning is always wrong
    return "CPU RNG state changed" not in record.getMessage()


@contextlib.contextmanager
def cpu_runtime() -> Iterator[bool]:
    """Let torch.cuda answer for the CPU inside the context; the value tells whether it does.

    False, and nothing is touched, on a machine with a GPU. Contexts may be nested; the outermost one counts. Everything
    is put back at the end, also after an error.
    """
    if not needed():
        yield active()
        return
    logger = logging.getLogger("megatron.core.tensor_parallel.random")
    done: list[Replaced] = []
    with contextlib.ExitStack() as undo:
        logger.addFilter(_not_about_generators)
        undo.callback(logger.removeFilter, _not_about_generators)
        # compiled fusions would be built for the CPU at great cost and no use
        undo.enter_context(_eager())
        undo.callback(restore_all, done)
        for entry in REPLACEMENTS:
            done.extend(replace(target, entry.make) for target in entry.targets)
        yield True


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def needed() -> bool:
    """True if this machine has no accelerator that Megatron could use."""
    return not torch.cuda.is_available()


def active() -> bool:
    """True if the CPU runtime is in force."""
    return torch.cuda.Stream is Stream
