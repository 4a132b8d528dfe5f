"""Attention through torch's own fused ops: CPU flash, and on CUDA flash or cuDNN, whichever is faster for the shape."""

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Iterator, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from megatron_cp.kernels import check_backward, check_call
from megatron_cp.kernels.aten import CUDA_FLASH, CUDNN, Op, cpu_flash

CPU_DTYPES = ("float64", "float32", "bfloat16", "float16")
CUDA_DTYPES = ("bfloat16", "float16")
CUDA_WIDEST_HEAD = 256
TIMED_CALLS = 3
# two bfloat16 kernels differ by a few roundings of the largest element; a wrong one by its own size
AGREEMENT = 0.03


def refusal(*, device: str, dtype: str, head_dim: int) -> str | None:
    """Why this kernel cannot run that, or None."""
    if device == "cpu":
        return None if dtype in CPU_DTYPES else f"has no CPU op for {dtype}"
    if device != "cuda":
        return f"has no op for device {device}"
    if dtype not in CUDA_DTYPES:
        return f"has no fused CUDA op that gives the logsumexp of {dtype}"
    if head_dim > CUDA_WIDEST_HEAD:
        return f"takes head dims up to {CUDA_WIDEST_HEAD} on CUDA, not {head_dim}"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "needs an Ampere GPU or a later one"
    return None


def create(*, deterministic: bool) -> "TorchKernel":
    return TorchKernel(deterministic=deterministic)


class Shape(NamedTuple):
    """What decides which op is faster; lengths in tokens."""

    direction: str
    dtype: torch.dtype
    queries: int
    keys: int
    batch: int
    heads: int
    groups: int
    head_dim: int
    causal: bool


class Choice(NamedTuple):
    """The op that won a shape and the sentence that says by how much."""

    op: Op
    reason: str


class TorchKernel:
    """Fused attention without the score matrix.

    CUDA shapes are timed once each, forward and backward apart, unless a graph is being captured or `deterministic`
    is set: both take flash. `choices` says per shape which op runs and why.
    """

    name = "torch"

    def __init__(self, *, deterministic: bool = False) -> None:
        self.deterministic = deterministic
        self.choices: dict[Shape, Choice] = {}
        self._cpu_op = cpu_flash()

    def forward(
        self,
        q: Float[Tensor, "s b h d"],
        k: Float[Tensor, "t b g d"],
        v: Float[Tensor, "t b g dv"],
        *,
        scale: float,
        causal: bool,
    ) -> tuple[Float[Tensor, "s b h dv"], Float[Tensor, "s b h"]]:
        """out and lse as views of what the op wrote; a value head dim unlike the key's is padded with zeros."""
        check_call(q, k, v, causal)
        q_, k_, v_ = _op_inputs(_op_width(q, v), q, k, v)
        op = self._op("forward", q, k, causal, lambda op: op.forward(q_, k_, v_, scale, causal))
        out, lse = op.forward(q_, k_, v_, scale, causal)
        return _from_op(out, v.shape[3]), lse.permute(2, 0, 1)

    def backward(
        self,
        dout: Float[Tensor, "s b h dv"],
        q: Float[Tensor, "s b h d"],
        k: Float[Tensor, "t b g d"],
        v: Float[Tensor, "t b g dv"],
        out: Float[Tensor, "s b h dv"],
        lse: Float[Tensor, "s b h"],
        *,
        scale: float,
        causal: bool,
    ) -> tuple[Float[Tensor, "s b h d"], Float[Tensor, "t b g d"], Float[Tensor, "t b g dv"]]:
        """dq, dk, dv; rows with lse -inf (no key in the whole sequence) give no gradient."""
        check_call(q, k, v, causal)
        check_backward(dout, q, v, out, lse)
        dout_, q_, k_, v_, out_ = _op_inputs(_op_width(q, v), dout, q, k, v, out)
        # exp(score - lse) must vanish in a row without keys
        lse_ = lse.masked_fill(lse == float("-inf"), float("inf")).permute(1, 2, 0)
        op = self._op("backward", q, k, causal, lambda op: op.backward(dout_, q_, k_, v_, out_, lse_, scale, causal))
        with _deterministic_ops() if self.deterministic and q.is_cuda else nullcontext():
            dq, dk, dv = op.backward(dout_, q_, k_, v_, out_, lse_, scale, causal)
        return _from_op(dq, q.shape[3]), _from_op(dk, q.shape[3]), _from_op(dv, v.shape[3])

    def report(self) -> list[str]:
        """One line for every shape that ran on CUDA: the op and why it is that one."""
        return [f"{_described(shape)}: {choice.reason}" for shape, choice in self.choices.items()]

    def _op(self, direction: str, q: Tensor, k: Tensor, causal: bool, call: Callable[[Op], tuple[Tensor, ...]]) -> Op:
        if not q.is_cuda:
            return self._cpu_op
        if self.deterministic:
            return CUDA_FLASH
        shape = Shape(
            direction, q.dtype, q.shape[0], k.shape[0], q.shape[1], q.shape[2], k.shape[2], q.shape[3], causal
        )
        if shape not in self.choices:
            if torch.cuda.is_current_stream_capturing():
                return CUDA_FLASH
            self.choices[shape] = race([CUDA_FLASH, CUDNN], call, cuda_milliseconds)
        return self.choices[shape].op


def race(
    ops: list[Op],
    call: Callable[[Op], tuple[Tensor, ...]],
    milliseconds: Callable[[Callable[[], object]], float],
) -> Choice:
    """The fastest of the ops that run and agree with the first one; the first one must run."""
    expected = call(ops[0])
    times = {ops[0].name: milliseconds(lambda: call(ops[0]))}
    outside: list[str] = []
    for op in ops[1:]:
        try:
            agrees = _agree(call(op), expected)
        except RuntimeError as error:
            outside.append(f"{op.name} refused: {str(error).splitlines()[0]}")
            continue
        if agrees:
            times[op.name] = milliseconds(lambda op=op: call(op))  # type: ignore[misc]
        else:
            outside.append(f"{op.name} disagreed with {ops[0].name} and is not used")
    winner = min(ops, key=lambda op: times.get(op.name, float("inf")))
    measured = ", ".join(f"{name} {time:.3f} ms" for name, time in times.items())
    return Choice(winner, "; ".join([f"{winner.name} ({measured})", *outside]))


def cuda_milliseconds(call: Callable[[], object]) -> float:
    """The best of a few calls, from events on the current stream; the first call has been made already."""
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


@contextmanager
def _deterministic_ops() -> Iterator[None]:
    # the op has no argument for it, only torch's global switch
    before, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def _op_width(q: Tensor, v: Tensor) -> int:
    # the ops want equal head dims, the CUDA ones multiples of 8
    widest = max(q.shape[3], v.shape[3])
    return -(-widest // 8) * 8 if q.is_cuda else widest


def _op_inputs(width: int, *tensors: Tensor) -> list[Tensor]:
    # s b h d -> b h s d, zeros behind d where the op needs a wider one: they change neither scores nor outputs
    padded = (x if x.shape[3] == width else functional.pad(x, (0, width - x.shape[3])) for x in tensors)
    return [x.permute(1, 2, 0, 3) for x in padded]


def _from_op(x: Tensor, width: int) -> Tensor:
    # b h s d -> s b h d
    return x.permute(2, 0, 1, 3)[..., :width]


def _described(shape: Shape) -> str:
    mask = "causal" if shape.causal else "full"
    heads = f"h={shape.heads} g={shape.groups} d={shape.head_dim}"
    return f"{shape.direction} {shape.queries}x{shape.keys} b={shape.batch} {heads} {mask} {shape.dtype}"
