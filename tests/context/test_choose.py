"""The choice of `auto` is the argmin of simulated times, and follows what is fast on a cluster."""

from dataclasses import replace
from functools import lru_cache

import pytest

from megatron_cp.context import ALGORITHMS, BACKENDS
from megatron_cp.context.auto import last_rank
from megatron_cp.context.choose import EXACT, candidates, choose, samples
from megatron_cp.context.trace.events import Problem
from megatron_cp.context.trace.record import record
from megatron_cp.context.trace.simulate import simulate
from megatron_cp.grid import Grid
from megatron_cp.hardware.cluster import Link
from megatron_cp.hardware.cluster_file import cluster_of, load_cluster, shipped_clusters
from tests.cases import slow_unless

H100 = load_cluster("h100-ib")
LONG = Problem("auto", 4, 2**16, 32, 8, 128, causal=True)
SHORT = replace(LONG, ranks=4, seq=2**10)

recorded, last = lru_cache(1024)(record), lru_cache(1024)(last_rank)


def chosen(problem, cluster=H100):
    return choose(problem, cluster, last, recorded)


def simulated(problem, cluster=H100):
    trace = recorded(problem)
    return sum(simulate(run, cluster).time for run in (trace.forward, trace.backward))


@pytest.mark.parametrize(
    ("causal", "window", "grid"),
    slow_unless(
        [(True, None, Grid(2, 2))],
        [
            (True, None, Grid(2, 2)),
            (True, None, None),
            (False, None, Grid(2, 2)),
            (True, (128, 0), None),
            (False, (16, 16), Grid(2, 2)),
        ],
    ),
    ids=str,
)
def test_first_and_second_are_the_fastest_of_all_that_take_the_problem(causal, window, grid):
    problem = replace(SHORT, causal=causal, window=window, grid=grid)
    times = []
    for candidate in candidates(problem):
        try:
            times.append((simulated(candidate), BACKENDS.names.index(candidate.backend)))
        except ValueError:
            continue
    found = chosen(problem).options[:2]
    assert [BACKENDS.names.index(option.problem.backend) for option in found] == [at for _, at in sorted(times)[:2]]
    assert [option.cost.time for option in found] == pytest.approx([time for time, _ in sorted(times)[:2]])


def test_the_same_question_has_the_same_answer():
    first, second = (choose(SHORT, H100, last_rank, record) for _ in range(2))
    assert first == second
    assert first.why == second.why


def test_fast_links_and_a_kv_head_per_rank_make_ulysses_win():
    assert chosen(LONG).problem.backend == "ulysses"


def test_fewer_kv_heads_on_slow_links_make_moving_keys_win():
    slow = replace(H100, ranks_per_node=1, between=Link(bytes_per_s=1e9, latency_s=1e-5, ports="shared"))
    problem = replace(LONG, seq=2**15, kv_heads=1)
    assert chosen(problem, slow).problem.backend not in ("ulysses", "fpdt")
    # queries and results are 64 times what one KV head is
    assert chosen(problem, slow).options[0].cost.time < 0.7 * simulated(replace(problem, backend="ulysses"), slow)


@pytest.mark.slow
def test_a_window_makes_the_ring_cheap():
    windowed = replace(LONG, window=(4096, 0))
    best = chosen(windowed).options[0]
    assert best.problem.backend in ("zigzag", "bidirectional", "ring")
    assert best.cost.time < simulated(replace(windowed, backend="ulysses"))


def test_too_few_heads_leave_what_exchanges_heads_out():
    problem = replace(LONG, heads=2, kv_heads=2)
    assert "ulysses" not in [option.problem.backend for option in chosen(problem).options]


def test_backends_on_a_grid_use_the_given_one_or_are_left_out():
    names = [candidate.backend for candidate in candidates(SHORT)]
    assert not [name for name in names if BACKENDS.get(name).needs_grid]
    on_grid = [c for c in candidates(replace(SHORT, grid=Grid(2, 2))) if BACKENDS.get(c.backend).needs_grid]
    assert {c.grid for c in on_grid} == {Grid(2, 2)}
    assert {c.placement for c in on_grid if c.backend == "usp"} == {"head-first", "context-first"}


def test_only_loops_are_weighed_and_only_for_their_speed():
    names = {candidate.backend for candidate in candidates(replace(SHORT, grid=Grid(2, 2)))}
    assert set(ALGORITHMS) - names == {"fpdt", "rsa"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zigzag", "ulysses"])
def test_times_on_many_ranks_are_continued_from_few(name):
    problem = replace(LONG, ranks=12, seq=12 * 2**13, heads=24)
    assert problem.ranks > EXACT
    found = {o.problem.backend: o for o in choose_all(problem)}
    assert found[name].cost.time == pytest.approx(simulated(replace(problem, backend=name)), rel=0.05)


def choose_all(problem):
    """Every option, because none is worse than the second best before it is simulated."""
    return choose(problem, H100, lambda candidate: last(candidate)[:0], recorded).options


def test_samples_keep_the_tokens_per_rank_and_the_shorter_axis():
    many = replace(LONG, ranks=64, seq=2**20)
    assert [(s.ranks, s.seq, s.grid) for s in samples(many)] == [(4, 2**16, None), (8, 2**17, None)]
    assert [s.grid for s in samples(replace(many, grid=Grid(8, 8)))] == [Grid(8, 1), Grid(8, 2)]
    assert [s.grid for s in samples(replace(many, grid=Grid(16, 4)))] == [Grid(1, 4), Grid(2, 4)]


def test_one_line_says_who_wins_against_whom_and_by_what():
    why = chosen(LONG).why
    assert "\n" not in why
    assert why.startswith("ulysses takes ")
    assert " on h100-ib, " in why
    assert " against " in why


def test_what_a_rank_has_no_memory_for_is_left_out():
    free = chosen(LONG)
    least = min(free.options, key=lambda option: option.peak)
    assert least.peak < free.options[0].peak
    found = chosen(LONG, replace(H100, memory_bytes=least.peak + 1.0, reserved_bytes=1.0))
    assert found.options[0].peak <= least.peak
    assert free.options[0] in found.too_large
    assert f"keeps at most {found.options[0].peak / 2**20:.4g} MiB" in found.why
    assert f"{free.options[0].label}, " in found.why or f"{free.options[0].label} more than a rank has" in found.why


def test_memory_that_nothing_fits_is_refused():
    with pytest.raises(ValueError, match=r"no backend fits the 0.0009766 GiB of a rank of cluster 'h100-ib': .* GiB;"):
        chosen(LONG, replace(H100, memory_bytes=2.0**20, reserved_bytes=0.0))


def test_a_cluster_that_does_not_join_the_ranks_is_refused():
    with pytest.raises(ValueError, match="is one node of 2 ranks"):
        chosen(LONG, replace(H100, ranks_per_node=2, between=None))


def test_what_every_backend_refuses_is_refused():
    with pytest.raises(ValueError, match="divisible"):
        chosen(replace(SHORT, seq=4 * 1023))


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        (None, "this-cpu"),
        ("NVIDIA H100 80GB HBM3", "h100-ib"),
        ("NVIDIA H200", "h100-ib"),
        ("NVIDIA A100-SXM4-80GB", "a100-ib"),
    ],
)
def test_a_gpu_has_its_cluster(gpu, name):
    assert cluster_of(gpu) == name
    assert name in shipped_clusters()


@pytest.mark.parametrize("gpu", ["NVIDIA A100-PCIE-40GB", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "Tesla V100-SXM2"])
def test_a_gpu_without_a_cluster_is_refused(gpu):
    with pytest.raises(ValueError, match=f"no shipped cluster has '{gpu}'.*--cp-cluster"):
        cluster_of(gpu)
