"""The trace of a loop: what it notes is what a real run does, at any size; and what it finds without running."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from megatron_cp.context import ALGORITHMS, BACKENDS, function
from megatron_cp.context.attend import attend
from megatron_cp.context.merge import accumulator_dtype
from megatron_cp.context.trace.events import (
    Compute,
    Message,
    Pass,
    Post,
    Problem,
    Step,
    Touch,
    UnmatchedError,
    Wait,
    match,
)
from megatron_cp.context.trace.live import LiveBytes
from megatron_cp.context.trace.record import plan_on, record, record_rank
from megatron_cp.grid import most_square
from tests.cases import slow_unless
from tests.context.problems import MASKS, grids
from tests.ranks import run_ranks


def visible_pairs(problem):
    left, right = (problem.seq if limit is None else limit for limit in problem.mask)
    return sum(min(problem.seq, i + right + 1) - max(0, i - left) for i in range(problem.seq))


@pytest.mark.parametrize(
    ("ranks", "causal", "window"),
    # windows, which are many tiles, take longest, and grids of four ranks
    slow_unless(
        lambda ranks, causal, window: causal,
        [(ranks, *mask) for ranks in (3, 4) for mask in MASKS if ranks == 3 or mask[1] is None],
    ),
    ids=lambda value: f"p{value}" if type(value) is int else None,
)
@pytest.mark.parametrize("backend", ALGORITHMS)
def test_work_is_every_unmasked_pair_of_every_head_in_both_passes(backend, ranks, causal, window):
    for grid in grids(backend, ranks):
        problem = Problem(backend, ranks, 12 * ranks, 8, 2, causal=causal, window=window, grid=grid)
        trace = record(problem)
        assert sum(trace.forward.work) == sum(trace.backward.work) == 8 * visible_pairs(problem)
        for run in (trace.forward, trace.backward):
            assert sum(run.sent) == sum(run.received) > 0
        if window is not None:
            banded = record(replace(problem, windows=True))
            assert (banded.forward.work, banded.backward.work) == (trace.forward.work, trace.backward.work)
            assert (banded.forward.sent, banded.backward.sent) == (trace.forward.sent, trace.backward.sent)


# kernel calls of a rank in the middle: in tiles, and where the kernel takes windows
CALLS = {"striped": (2059, 8), "ulysses": (516, 2), "all-gather": (152, 8), "zigzag": (38, 4)}


@pytest.mark.parametrize("windows", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["windows", "tiles"])
@pytest.mark.parametrize("backend", CALLS)
def test_calls_of_a_window_at_128k(backend, windows):
    problem = Problem(backend, 8, 2**17, 32, 8, 128, causal=True, window=(1023, 0), windows=windows)
    found = calls_of(problem, 4)
    print(f"{backend}: {found} kernel calls {'with the window of the kernel' if windows else 'in tiles'}")
    assert found == CALLS[backend][windows]


def calls_of(problem, rank):
    return sum(isinstance(event, Compute) for event, _ in record_rank(problem, rank)[0])


@pytest.mark.parametrize(("backend", "calls"), [("striped", 32), ("ulysses", 1), ("all-gather", 8), ("zigzag", 4)])
def test_calls_of_a_window_at_a_million(backend, calls):
    problem = Problem(backend, 32, 2**20, 32, 8, 128, causal=True, window=(8191, 0), windows=True)
    assert calls_of(problem, 16) == calls


class NoKernel:
    """Results as large as a fused kernel's and no temporary memory, as the recorder's kernel has."""

    name = "none"

    def forward(self, q, k, v, *, scale, causal):
        return torch.zeros_like(q), torch.zeros(q.shape[:3], dtype=accumulator_dtype(q))

    def backward(self, dout, q, k, v, out, lse, *, scale, causal):
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)


def over_gloo(problems, kernel):
    """Bytes sent and peak live bytes of this rank in each pass of each problem."""
    import torch.distributed as dist
    from torch.utils._python_dispatch import _disable_current_modes

    from megatron_cp.comm import GroupFabric, distributed

    class Copied:
        """A collective of copies that are not counted: gloo's thread may hold them for a moment after the wait."""

        def __init__(self, call, result, given, **options):
            with _disable_current_modes():
                self._result, self._copies = result, (result.clone(), given.clone())
                self._work = call(*self._copies, **options)

        def wait(self):
            with _disable_current_modes():
                self._work.wait()
                self._result.copy_(self._copies[0])

    distributed._all_gather = partial(Copied, distributed._all_gather)
    distributed._reduce_scatter = partial(Copied, distributed._reduce_scatter)
    dist.init_process_group("gloo")
    found = []
    for problem in problems:
        made = plan_on(problem, GroupFabric(dist.group.WORLD), kernel or NoKernel())
        tokens, dtype = problem.seq // problem.ranks, getattr(torch, problem.dtype)
        q, k, v, dout = (
            torch.randn(tokens, 1, heads, problem.head_dim, dtype=dtype)
            for heads in (problem.heads, problem.kv_heads, problem.kv_heads, problem.heads)
        )
        leaves = [x.requires_grad_() for x in (q, k, v)]
        # a first call compares the shapes of the ranks; gloo's thread may hold that message into the attention
        attend(*leaves, made)
        before = made.sent
        with LiveBytes(*leaves, dout) as live:
            out = function.run(*leaves, made)
            between, forward_peak, live.peak = made.sent, live.peak, live.now
            out.backward(dout)
        found.append((between - before, made.sent - between, forward_peak, live.peak))
        del out
    dist.barrier()
    return found


def problems(ranks, seq, dtype):
    return [
        Problem(name, ranks, seq, 8, 4, 16, causal, window, dtype, most_square(ranks) if entry.needs_grid else None)
        for entry in map(BACKENDS.get, ALGORITHMS)
        for name in [entry.name]
        for causal, window in ((True, None), (False, None), (True, (20, 0)))
    ]


@pytest.mark.parametrize(("ranks", "dtype"), slow_unless([(2, "float32")], [(2, "float32"), (4, "bfloat16")]))
def test_traffic_and_peak_memory_of_a_real_run_are_the_trace_s_to_the_byte(ranks, dtype):
    asked = problems(ranks, 48 * ranks, dtype)
    per_rank = run_ranks(ranks, over_gloo, asked, None)
    wrong = []
    for index, problem in enumerate(asked):
        trace = record(problem)
        expected = list(
            zip(trace.forward.sent, trace.backward.sent, trace.forward.peak, trace.backward.peak, strict=True)
        )
        found = [results[index] for results in per_rank]
        if found != expected:
            wrong.append((problem.backend, problem.causal, problem.window, found, expected))
    assert not wrong


def test_peak_memory_with_a_real_kernel_is_the_trace_s_but_for_the_kernel_s_copies():
    # the CPU's fused op makes its results itself; what it needs inside, it does not tell
    asked = [Problem(name, 2, 1024, 8, 4, 64, True, dtype="float32") for name in ("zigzag", "ulysses", "distflash")]
    per_rank = run_ranks(2, over_gloo, asked, "torch")
    for index, problem in enumerate(asked):
        trace = record(problem)
        for rank, results in enumerate(per_rank):
            *_, forward, backward = results[index]
            assert forward == pytest.approx(trace.forward.peak[rank], rel=0.1)
            assert backward == pytest.approx(trace.backward.peak[rank], rel=0.1)


def test_a_million_tokens_on_sixteen_ranks_cost_no_memory():
    trace = record(Problem("zigzag", 16, 2**20, 64, 8, 128, causal=True))
    unit = 2**16 * 8 * 128 * 2
    assert sum(trace.forward.sent) == 0.75 * 16 * 2 * 15 * unit
    assert sum(trace.forward.load()[3]) == trace.forward.work[3]


def test_relayout_is_counted_on_a_line_of_its_own():
    ring = record(Problem("ring", 4, 4096, 8, 8, causal=True))
    native = record(Problem("ring", 4, 4096, 8, 8, causal=True, layout="contiguous"))
    assert native.relayout == [0] * 4
    ours, theirs = ([a + b for a, b in zip(t.forward.sent, t.backward.sent, strict=True)] for t in (ring, native))
    assert ring.relayout == [a - b for a, b in zip(ours, theirs, strict=True)]
    assert min(ring.relayout) > 0


def test_traffic_between_nodes_is_told_apart():
    trace = record(Problem("zigzag", 4, 64, causal=False))
    # a ring over two nodes of two ranks leaves a node once
    assert trace.forward.sent_between(2) in ([trace.forward.sent[0], 0] * 2, [0, trace.forward.sent[0]] * 2)
    assert trace.forward.sent_between(4) == [0] * 4


def steps(*events):
    return tuple(Step(event, 0) for event in events)


def post(batch, sends=(), recvs=()):
    group = (0, 1)
    return Post(batch, group, tuple(Message(*x) for x in sends), tuple(Message(*x) for x in recvs))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([post(0, recvs=[(1, 8)]), Wait(0)], [], "rank 0 waits for 1 messages of rank 1, who sends nothing"),
        ([post(0, sends=[(1, 8)])], [], "rank 0 sends 1 messages to rank 1, who takes 0"),
        ([post(0, sends=[(1, 8)])], [post(0, recvs=[(0, 16)]), Wait(0)], "has 8 bytes, the receiver expects 16"),
        (
            [post(0, recvs=[(1, 8)]), Wait(0), post(1, sends=[(1, 8)])],
            [post(0, recvs=[(0, 8)]), Wait(0), post(1, sends=[(0, 8)])],
            "ranks 0, 1 wait for each other's messages without end",
        ),
    ],
)
def test_what_would_hang_is_found_offline(first, second, message):
    with pytest.raises(UnmatchedError, match=message):
        match(Pass((steps(*first), steps(*second)), 1))


def test_what_works_is_matched():
    both = [post(0, sends=[(1, 8)], recvs=[(1, 4)]), Compute(2, 2, 1, 1, 1, True, False), Wait(0), Touch(3)]
    other = [post(0, sends=[(0, 4)], recvs=[(0, 8)]), Wait(0)]
    run = Pass((steps(*both), steps(*other)), 1)
    match(run)
    assert (run.work, run.sent, run.received) == ([3, 0], [8, 4], [4, 8])
    assert run.traffic == [[0, 8], [4, 0]]
