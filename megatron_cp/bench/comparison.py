"""Compare implementations of one attention with a single kernel call over the whole sequence."""

import statistics
import time
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from math import isnan, nan
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_cp.comm import Fabric, largest
from megatron_cp.context.layouts import indices
from megatron_cp.context.self_check import LARGEST_ERROR
from megatron_cp.context.trace.live import LiveBytes
from megatron_cp.dtypes import BYTES
from megatron_cp.kernels import Kernel, choose

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in BYTES}

HALF_PRECISION = (torch.bfloat16, torch.float16)
"""Dtypes whose kernels may round each tile, as CPUs with AMX or AVX512-BF16 do: two right results differ by both
roundings, so on a CPU each is compared with float64, the whole kernel call too."""


WHOLE = "whole kernel call"


@dataclass(frozen=True)
class AttentionShape:
    """One attention: batch, tokens, query and KV heads, head dim."""

    seq: int
    _: KW_ONLY
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    batch: int = 1
    causal: bool = True
    dtype: str = "float32"


@dataclass(frozen=True, kw_only=True)
class BackendResult:
    """One candidate's figures at one shape; None where there is no figure.

    ranks:     over which the attention was divided
    forward, backward: median seconds; share_of_ideal: whole kernel call / ranks / (forward + backward)
    sent:      bytes per rank, forward and backward, the largest over ranks
    peak:      live bytes that the pass adds to the local q, k, v and dout at most, the largest over ranks
    max_error: deviation of out, dq, dk, dv from the whole kernel call, over its largest value; on a CPU in bfloat16 and
               float16 from float64, that of the whole kernel call too
    problem:   reason why it has no times: its result is wrong, or it refuses the shape
    took:      the backend that `auto` took, and why
    predicted: seconds of both passes by the trace of the backend and tiles timed in the same run
    """

    backend: str
    ranks: int
    seq: int
    forward: float | None = None
    backward: float | None = None
    share_of_ideal: float | None = None
    sent: int | None = None
    peak: int | None = None
    max_error: float | None = None
    problem: str = ""
    took: str = ""
    predicted: tuple[float, float] | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the figures, and the predictions if there are any."""
        figures = {name: getattr(self, name) for name in JSON_KEYS}
        if self.predicted:
            figures |= {"predicted_forward": self.predicted[0], "predicted_backward": self.predicted[1]}
        return figures


JSON_KEYS = "backend ranks seq forward backward share_of_ideal sent peak max_error".split()


class WrongResultError(Exception):
    """Raised on every rank when a backend's result differs from the whole kernel call."""


class RefusedError(Exception):
    """Raised on every rank, with a reason in one line, when another library's attention cannot compute the shape."""


class TimedPasses:
    """Times of a forward and a backward pass that all ranks start together; the slowest rank counts."""

    def __init__(
        self, fabric: Fabric, device: torch.device, forward: Callable[[], Any], backward: Callable[[Any], Any]
    ) -> None:
        self._fabric, self._device = fabric, device
        self._passes = forward, backward
        self.seconds: tuple[list[float], list[float]] = ([], [])
        self._core_shares: list[float] = []

    def time(self) -> None:
        """Run and time both passes once."""
        forward, backward = self._passes
        state = self._once(forward, self.seconds[0])
        self._once(lambda: backward(state), self.seconds[1])

    @property
    def medians(self) -> tuple[float, float]:
        return statistics.median(self.seconds[0]), statistics.median(self.seconds[1])

    @property
    def core_share(self) -> float:
        """Median over the passes of the smallest share of a core that a rank got."""
        return statistics.median(self._core_shares)

    def _once(self, run: Callable[[], Any], seconds: list[float]) -> Any:
        largest(self._fabric, self._device)
        wall, core = time.perf_counter(), time.thread_time()
        result = run()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        wall, core = time.perf_counter() - wall, time.thread_time() - core
        wall_of_slowest, idle = largest(self._fabric, self._device, wall, 1 - core / wall)
        seconds.append(wall_of_slowest)
        self._core_shares.append(1 - idle)
        return result


class Comparison:
    """One shape's inputs, equal on every rank, the whole kernel call on them, and the results to compare with.

    reference: the name of what made those results; own_error: the deviation of the whole kernel call from them
    """

    def __init__(self, fabric: Fabric, device: torch.device, shape: AttentionShape, kernel: str) -> None:
        self.fabric, self.device, self.shape, self.kernel_name = fabric, device, shape, kernel
        self.dtype = DTYPES[shape.dtype]
        self.inputs = _inputs(shape, device)
        self.kernel = choose(kernel, device=device.type, dtype=shape.dtype, head_dim=shape.head_dim)
        scale, causal, (q, k, v, dout) = shape.head_dim**-0.5, shape.causal, self.inputs
        attention = self.kernel[0]
        self.whole = TimedPasses(
            fabric,
            device,
            lambda: attention.forward(q, k, v, scale=scale, causal=causal),
            lambda state: attention.backward(dout, q, k, v, *state, scale=scale, causal=causal),
        )
        made = [result.to(self.dtype) for result in _both(attention, self.inputs, scale, causal)]
        self._size = sum(tensor.numel() * tensor.element_size() for tensor in made)
        self.expected, self.reference, self.own_error = made, "the whole kernel call", 0.0
        if device.type == "cpu" and self.dtype in HALF_PRECISION:
            exact, _ = choose("torch", device="cpu", dtype="float64", head_dim=shape.head_dim)
            self.expected = _both(exact, tuple(x.double() for x in self.inputs), scale, causal)
            self.reference = "attention in float64"
            self.own_error = max(_deviation(*pair) for pair in zip(made, self.expected, strict=True))

    def row(self) -> BackendResult:
        """Return the figures of the whole kernel call, which every rank makes."""
        forward, backward = self.whole.medians
        return BackendResult(
            backend=WHOLE,
            ranks=1,
            seq=self.shape.seq,
            forward=forward,
            backward=backward,
            share_of_ideal=1.0,
            sent=0,
            peak=self._size,
            max_error=self.own_error,
        )


def sends_nothing(run: Callable[[], None]) -> int:
    """Run and return 0, for an `Implementation` that does all the work on every rank."""
    run()
    return 0


class Implementation(NamedTuple):
    """An implementation of attention to compare.

    layout: the layout of its tokens; None where each rank has all of them and does all the work
    attend: (q, k, v) -> out, differentiable
    sent:   runs a function and returns the bytes that this rank sent in it, or None where they cannot be counted
    trusted: True for our own, whose wrong result ends the bench; a wrong result of others is a line of the table
    took:   the backend behind the name, where it was chosen for this shape
    """

    name: str
    layout: str | None
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    sent: Callable[[Callable[[], None]], int | None]
    trusted: bool = True
    took: str = ""


class Candidate(TimedPasses):
    """One implementation in a comparison; `problem` is the reason why it has no times."""

    def __init__(self, comparison: Comparison, entry: Implementation) -> None:
        super().__init__(comparison.fabric, comparison.device, self._forward, self._backward)
        self._comparison, self.entry = comparison, entry
        self._ranks = comparison.fabric.size if entry.layout else 1
        rank = comparison.fabric.rank if entry.layout else 0
        mine = indices(entry.layout or "contiguous", comparison.shape.seq, self._ranks, rank)
        self._mine = torch.tensor(mine, device=comparison.device)
        q, k, v, self._dout = (tensor[self._mine] for tensor in comparison.inputs)
        self._leaves = tuple(tensor.requires_grad_() for tensor in (q, k, v))
        self._facts: tuple[int | None, int | None, float | None] = (None, None, None)
        self.problem = ""

    def check(self) -> None:
        """Record bytes sent, peak live bytes and deviation, the largest over ranks.

        Raises WrongResultError when a trusted implementation is wrong.
        """
        try:
            sent, peak, error = largest(self._fabric, self._device, *self._once_checked())
        except (NotImplementedError, RuntimeError, RefusedError) as refusal:
            if self.entry.trusted:
                raise
            self.problem = f"refused: {str(refusal).splitlines()[0]}"
            return
        self._facts = (None if isnan(sent) else int(sent), int(peak), error)
        if not error <= LARGEST_ERROR[self._comparison.dtype]:
            self.problem = f"wrong: deviates from {self._comparison.reference} by {error:.1e}"
        if self.problem and self.entry.trusted:
            raise WrongResultError(
                f"backend {self.entry.name!r} is {self.problem} at {self._comparison.shape}; "
                "no figure of this run can be trusted"
            )

    def row(self) -> BackendResult:
        """Return the figures, or the problem instead of times."""
        (sent, peak, error), seq = self._facts, self._comparison.shape.seq
        result = BackendResult(
            backend=self.entry.name, ranks=self._ranks, seq=seq, max_error=error, problem=self.problem
        )
        if self.problem:
            return result
        forward, backward = self.medians
        share = sum(self._comparison.whole.medians) / self._ranks / (forward + backward)
        return replace(
            result,
            forward=forward,
            backward=backward,
            share_of_ideal=share,
            sent=sent,
            peak=peak,
            took=self.entry.took,
        )

    def _once_checked(self) -> tuple[float, float, float]:
        found: list[Tensor | None] = []

        def once() -> None:
            out = self._forward()
            self._backward(out)
            found.extend((out, *(leaf.grad for leaf in self._leaves)))

        with LiveBytes(*self._leaves, self._dout) as live:
            sent = self.entry.sent(once)
        error = max(_deviation(x, whole[self._mine]) for x, whole in zip(found, self._comparison.expected, strict=True))
        return nan if sent is None else sent, live.peak, error

    def _forward(self) -> Tensor:
        q, k, v = self._leaves
        return self.entry.attend(q, k, v)

    def _backward(self, out: Tensor) -> None:
        for leaf in self._leaves:
            leaf.grad = None
        out.backward(self._dout)


def _both(kernel: Kernel, inputs: tuple[Tensor, ...], scale: float, causal: bool) -> list[Tensor]:
    """Return out, dq, dk, dv of the whole sequence."""
    q, k, v, dout = inputs
    out, lse = kernel.forward(q, k, v, scale=scale, causal=causal)
    return [out, *kernel.backward(dout, q, k, v, out, lse, scale=scale, causal=causal)]


def _inputs(shape: AttentionShape, device: torch.device) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    sizes = [(shape.seq, shape.batch, count, shape.head_dim) for count in heads]
    return tuple(torch.randn(size, generator=generator).to(device, DTYPES[shape.dtype]) for size in sizes)


def _deviation(found: Tensor | None, expected: Tensor) -> float:
    assert found is not None
    found, expected = found.detach().double(), expected.double()
    return ((found - expected).abs().max() / expected.abs().max()).item()
