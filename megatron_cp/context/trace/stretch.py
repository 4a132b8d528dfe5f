"""Traces of long sequences out of one recording: a loop without a window does the same at any length, only longer."""

from dataclasses import replace
from functools import lru_cache

from megatron_cp.context import cache_sizes
from megatron_cp.context.choose import Record
from megatron_cp.context.merging import SEVERAL
from megatron_cp.context.trace.events import (
    Compute,
    Event,
    HostCopy,
    Matmul,
    Message,
    Pass,
    Post,
    Problem,
    Step,
    Touch,
    Trace,
)
from megatron_cp.dtypes import BYTES

TOKENS = 256
"""Tokens of a rank in the recorded sequence: enough for every tile and every piece, and a divisor of usual lengths."""


# one for each way to record that is in use
@lru_cache(4)
def stretching(record: Record) -> Record:
    """`record` that runs each loop once, at TOKENS per rank, and multiplies tokens; the traces are the same.

    Problems with a window or documents, in chunks or with odd lengths are recorded as they are, and so are those on a
    GPU whose partial results are too large to wait for each other.
    """
    recorded = lru_cache(cache_sizes.TRACES)(record)

    @lru_cache(cache_sizes.TRACES)
    def stretched(problem: Problem) -> Trace:
        times, odd = divmod(problem.seq, TOKENS * problem.ranks)
        if (
            odd
            or times < 2
            or problem.mask.window
            or problem.documents
            or problem.chunks is not None
            or _merges_early(problem)
        ):
            return recorded(problem)
        return longer(recorded(replace(problem, seq=TOKENS * problem.ranks)), times)

    return stretched


def _merges_early(problem: Problem) -> bool:
    """True if some partial results may be merged before the others have come, for lack of memory."""
    # four times: parts of K and V may be views of a buffer with both, or with the heads of the queries too
    size = 4 * problem.seq * problem.heads * problem.head_dim * BYTES[problem.dtype]
    return problem.device == "cuda" and size > SEVERAL.waiting


def longer(trace: Trace, times: int) -> Trace:
    """Return the trace of the same problem on a sequence that is `times` as long."""
    problem = replace(trace.problem, seq=trace.problem.seq * times)
    forward, backward = (_longer_pass(run, times) for run in (trace.forward, trace.backward))
    return Trace(problem, forward, backward, [size * times for size in trace.relayout])


def _longer_pass(run: Pass, times: int) -> Pass:
    steps = tuple(tuple(Step(_longer(event, times), live * times) for event, live in each) for each in run.steps)
    # pairs of queries and keys, but for those of a query with itself, grow with the square; loops of kernels have none
    assert not run.rows, "a loop without a kernel is not stretched"
    return Pass(steps, run.head_dim)


def _longer(event: Event, times: int) -> Event:
    match event:
        case Compute():
            return event._replace(queries=event.queries * times, keys=event.keys * times)
        case Touch() | HostCopy():
            return event._replace(size=event.size * times)
        case Post():
            return event._replace(sends=_sized(event.sends, times), recvs=_sized(event.recvs, times))
        case Matmul():
            return event._replace(flops=event.flops * times**2)
        case _:
            return event


def _sized(messages: tuple[Message, ...], times: int) -> tuple[Message, ...]:
    return tuple(message._replace(size=message.size * times) for message in messages)
