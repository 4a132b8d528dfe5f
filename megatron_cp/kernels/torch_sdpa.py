"""Attention through torch's own fused ops: CPU flash, and on CUDA flash or cuDNN, whichever is faster for the shape."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cp import config
from megatron_cp.dtypes import BYTES
from megatron_cp.errors import CannotRun, Refused
from megatron_cp.kernels.aten import CUDA_FLASH, cpu_flash, cudnn, other_schema, reproducible
from megatron_cp.kernels.fused import FusedKernel, Op, Shape
from megatron_cp.kernels.measured import measured
from megatron_cp.kernels.packages import lacking_gpu

CPU_DTYPES = tuple(BYTES)
CUDA_DTYPES = ("bfloat16", "float16")
CUDA_WIDEST_HEAD = 256
TIMED_CALLS = 3
# two bfloat16 kernels differ by a few roundings of the largest element; a wrong one by its own size
AGREEMENT = 0.03
KNOWN = "faster on GPUs of this generation"
OP = "MEGATRON_CP_TORCH_OP"
"""The variable that names the op to take before the other, in every run alike."""


def refusal(*, device: str, dtype: str, head_dim: int) -> str | None:
    """Why this kernel cannot run that, or None."""
    if device == "cpu":
        return None if dtype in CPU_DTYPES else f"has no CPU op for {dtype}"
    if device != "cuda":
        return f"has no op for device {device}"
    if dtype not in CUDA_DTYPES:
        return f"has no fused CUDA op for {dtype} (it has for {' and '.join(CUDA_DTYPES)})"
    if head_dim > CUDA_WIDEST_HEAD:
        return f"takes head dims up to {CUDA_WIDEST_HEAD} on CUDA, not {head_dim}"
    return None


def missing(*, device: str) -> str | None:
    """Return what this machine lacks for it, or None; torch goes by the schemas of its ops, whatever its version."""
    return other_schema(device) or lacking_gpu(device)


def create(*, device: str, deterministic: bool) -> FusedKernel:
    return FusedKernel("torch", TorchOps(device=device, deterministic=deterministic))


Agree = Callable[[str, str], str]


def first_of_the_job(shape: str, name: str) -> str:
    """Return the op that the first rank of the job chose for a shape, `name` if that is this rank; no rank waits."""
    if not (dist.is_available() and dist.is_initialized()):
        return name
    store = dist.distributed_c10d._get_default_store()
    return store.compare_set(f"megatron-cp/op/{shape}", "", name).decode()


class OpChoice(NamedTuple):
    """The op that won a shape and what was measured."""

    op: Op
    reason: str


class TorchOps:
    """Picks CPU flash on the CPU and on CUDA the faster op of each shape, timed once, forward and backward apart.

    Where one op was measured to be faster on this generation of GPUs, or the variable `OP` names one, it takes that for
    every shape that the op runs, in every run alike; where ops are timed, a restart may find another one faster.
    It takes flash unmeasured while a CUDA graph is captured, for windows, which cuDNN's op does not take, and always
    when `deterministic`. Where ranks are joined, the first one that measures a shape decides for all: `agree` gets the
    shape and the name of the op that won here, and returns the name that counts.
    """

    def __init__(self, *, device: str, deterministic: bool, agree: Agree = first_of_the_job) -> None:
        self.choices: dict[Shape, OpChoice] = {}
        self._cpu, self._agree = cpu_flash(torch.__version__), agree
        self._flash = reproducible(CUDA_FLASH) if deterministic else CUDA_FLASH
        self.candidates = [self._flash] if deterministic else [self._flash, cudnn()]
        self._known, self._why = preferred(device)
        # the one that is known to be faster comes first
        self.candidates.sort(key=lambda op: op.name != self._known)
        self.windows = device == "cuda"

    def pick(self, shape: Shape, device: torch.device, call: Callable[[Op], tuple[Tensor, ...]]) -> Op:
        if device.type == "cpu":
            return self._cpu
        if shape.window is not None:
            return self._flash
        if len(self.candidates) == 1:
            return self.candidates[0]
        if shape not in self.choices:
            if torch.cuda.is_current_stream_capturing():
                return self.candidates[0]
            if self._known:
                self.choices[shape] = first_that_runs(self.candidates, call, self._why)
            else:
                self.choices[shape] = self._agreed(shape, fastest(self.candidates, call, cuda_milliseconds))
        return self.choices[shape].op

    def _agreed(self, shape: Shape, mine: OpChoice) -> OpChoice:
        name = self._agree(str(shape), mine.op.name)
        if name == mine.op.name:
            return mine
        (op,) = (one for one in self.candidates if one.name == name)
        return OpChoice(op, f"{name}, as the first rank with this shape chose; here it was {mine.reason}")

    def report(self) -> list[str]:
        return [f"{shape}: {choice.reason}" for shape, choice in self.choices.items()]


def preferred(device: str) -> tuple[str, str]:
    """Return the name of the op to take without measuring and the reason; two empty strings where shapes are measured.

    Raises ValueError where the variable `OP` names no op.
    """
    names = [CUDA_FLASH.name, cudnn().name]
    if wanted := config.variable(OP):
        if wanted not in names:
            raise Refused(f"{OP} is {' or '.join(names)}, got {wanted!r}; set it to one of them or leave it out")
        return wanted, f"as {OP} says"
    entry = measured(device)
    return (entry.op, KNOWN) if entry is not None and entry.op else ("", "")


def first_that_runs(ops: list[Op], call: Callable[[Op], tuple[Tensor, ...]], why: str) -> OpChoice:
    """Return the first of the ops that does not refuse the call; raises RuntimeError where all do.

    why: why the first one comes first
    """
    refused: list[str] = []
    for op in ops:
        try:
            call(op)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            refused.append(f"{op.name} refused: {str(error).splitlines()[0]}")
        else:
            return OpChoice(op, "; ".join([op.name, *refused]) if refused else f"{op.name}, {why}")
    raise CannotRun("; ".join(refused))


def fastest(
    ops: list[Op],
    call: Callable[[Op], tuple[Tensor, ...]],
    milliseconds: Callable[[Callable[[], object]], float],
) -> OpChoice:
    """Return the fastest of the ops that run and agree with the first one; the first one must run."""
    expected = call(ops[0])
    times = {ops[0].name: milliseconds(lambda: call(ops[0]))}
    outside: list[str] = []
    for op in ops[1:]:
        try:
            agrees = _agree(call(op), expected)
            if agrees:
                times[op.name] = milliseconds(lambda op=op: call(op))  # type: ignore[misc]
            else:
                outside.append(f"{op.name} disagreed with {ops[0].name} and is not used")
        except torch.OutOfMemoryError:
            # the results of both are alive here, and at no other time: the first op alone may fit
            outside.append(f"{op.name} had no memory beside {ops[0].name}'s results and is not used")
        except RuntimeError as error:
            outside.append(f"{op.name} refused: {str(error).splitlines()[0]}")
    winner = min(ops, key=lambda op: times.get(op.name, float("inf")))
    measured = ", ".join(f"{name} {time:.3f} ms" for name, time in times.items())
    return OpChoice(winner, "; ".join([f"{winner.name} ({measured})", *outside]))


def cuda_milliseconds(call: Callable[[], object]) -> float:
    """Return the best of a few calls, by events on the current stream; the first call has been made already."""
    times = []
    for _ in range(TIMED_CALLS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times)


def _agree(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    pairs = zip(results, expected, strict=True)
    return all(bool((a - b).abs().max() <= AGREEMENT * b.abs().max()) for a, b in pairs)
