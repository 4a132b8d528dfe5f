"""Host time: one rank's loop with a fabric and a kernel that do nothing, counted."""

import json
import sys

import pytest
from typer.testing import CliRunner

from megatron_cp.bench import host
from megatron_cp.bench.host import HEAD_DIM, TOKENS_PER_RANK, host_time, kernel_time
from megatron_cp.cli import app
from megatron_cp.context import ALGORITHMS
from megatron_cp.context.trace.events import Compute, Post, Problem
from megatron_cp.context.trace.record import record
from megatron_cp.grid import Grid
from megatron_cp.hardware.cluster_file import load_cluster


@pytest.fixture(autouse=True)
def _one_round(monkeypatch):
    monkeypatch.setattr(host, "ROUNDS", 1)


@pytest.mark.parametrize("backend", ALGORITHMS)
def test_messages_and_calls_are_those_of_the_trace(backend):
    ranks, found = 4, host_time(backend, 4, 8, 4, causal=True)
    grid = Grid(*map(int, found.grid.split())) if found.grid else None
    trace = record(Problem(backend, ranks, ranks * TOKENS_PER_RANK, 8, 4, HEAD_DIM, grid=grid))
    for timed, run in ((found.forward, trace.forward), (found.backward, trace.backward)):
        events = [event for event, _ in run.steps[ranks // 2]]
        assert timed.messages == sum(len(event.sends) for event in events if isinstance(event, Post))
        assert timed.calls == sum(isinstance(event, Compute) for event in events)
        assert timed.ms > 0


def test_a_refusal_is_named():
    found = host_time("ulysses", 8, 4, 4, causal=True)
    assert found.forward is None
    assert "8 ranks cannot share 4 query heads" in found.problem


def python_calls(backend, ranks):
    """Calls of functions in both passes once everything that depends on sizes only is planned."""
    count = 0

    def count_call(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    class Counting:
        def __init__(self, timed):
            self.timed = timed

        def __call__(self, *arguments):
            if self.warm:
                sys.setprofile(count_call)
            try:
                return self.timed(*arguments)
            finally:
                sys.setprofile(None)

    timed = Counting(host._timed)
    timed.warm = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "_timed", timed)
        host_time(backend, ranks, 32, 8, causal=True)
        timed.warm = True
        count = 0
        patch.setattr(host, "WARM_UP", 0)
        host_time(backend, ranks, 32, 8, causal=True)
    return count


@pytest.mark.parametrize("backend", [name for name in ALGORITHMS if name != "fpdt"])
def test_work_on_the_host_grows_with_the_ranks_only(backend):
    # four times the ranks are four times the hops; a loop over pairs of ranks would be sixteen times as long
    assert python_calls(backend, 32) <= 6 * python_calls(backend, 8)


def test_kernel_time_is_the_operations_over_the_rate():
    cluster = load_cluster("h100-ib")
    full = kernel_time(cluster, 4096, 8, 128, 8, causal=False)
    assert full.forward == pytest.approx(4 * 4096**2 * 8 * 128 / 8 / cluster.flops_forward * 1e3)
    causal = kernel_time(cluster, 4096, 8, 128, 8, causal=True)
    assert 2 * causal.backward == pytest.approx(full.backward, rel=1e-3)


def test_command_prints_every_backend():
    words = ["bench", "host", "--ranks", "4", "--heads", "8", "--kv-heads", "4"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert all(name in result.output for name in ALGORITHMS)
    rows = json.loads(CliRunner().invoke(app, [*words, "--backend", "zigzag", "--json"]).output)
    assert [(row["backend"], row["ranks"], row["forward"][1:]) for row in rows] == [("zigzag", 4, [3, 4, 1])]
