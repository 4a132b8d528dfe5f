"""Estimates for the machine at hand: the description that calibrate writes, and the command."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from megatron_cp.bench import calibrate
from megatron_cp.bench.calibrate import Rates, as_yaml
from megatron_cp.bench.links import MachineRates
from megatron_cp.cli import app, estimate
from megatron_cp.comm import SingleFabric
from megatron_cp.hardware.cluster import COLLECTIVES
from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.planner import published

LINKS = MachineRates(
    device="x86_64 CPU",
    dtype="float32",
    bytes_per_s=1.2e9,
    latency_s=1e-4,
    busy_s_per_byte=3e-10,
    touch_bytes_per_s=3e10,
    flops_forward=7e10,
    flops_backward=6e10,
    call_s=5e-5,
)
RATES = Rates(
    {64: 2e10, 512: 8e10},
    5e9,
    1.5e10,
    2e-3,
    {"gather": 5e8, "scatter": 2e8, "reduce": 4e8},
    (4e10, 5e10),
    512,
    9e8,
    0.02,
    0.003,
)


def run(*words: str):
    return CliRunner().invoke(app, ["estimate", *words])


@pytest.fixture
def here(tmp_path):
    file = tmp_path / "here.yaml"
    file.write_text(as_yaml(LINKS, RATES))
    return str(file)


def test_what_calibrate_writes_is_read_back(here):
    cluster = load_cluster(here)
    assert cluster.gemm("float32").rate(512) == pytest.approx(8e10, rel=1e-3)
    assert cluster.gemm("float32").rate(64) == pytest.approx(2e10, rel=1e-3)
    assert (cluster.flops_forward, cluster.flops_backward) == pytest.approx((4e10, 5e10), rel=1e-3)
    assert (cluster.elementwise_bytes_per_s, cluster.loss_bytes_per_s) == pytest.approx((5e9, 1.5e10))
    assert [cluster.inside.rate(kind) for kind in COLLECTIVES] == pytest.approx([5e8, 2e8, 4e8])
    assert (cluster.inside.latency_s, cluster.inside.busy_s_per_message) == pytest.approx((1e-4, 2e-3))
    assert cluster.reserved_bytes == pytest.approx(9e8)
    assert (cluster.block_keys, cluster.step_s, cluster.layer_s) == pytest.approx((512, 0.02, 0.003))


@pytest.mark.parametrize("name", ["quickstart", "tiny-cp2", "tiny-pp2", "tiny-tp2"])
def test_small_recipes_are_estimated_for_this_cpu(name):
    told = json.loads(run(name, "--json").stdout)
    assert told["gpus"] == 2
    assert told["fits"]
    assert sum(told["parts_seconds"].values()) == pytest.approx(told["step_seconds"])


def test_the_algorithm_is_named_where_there_are_context_ranks():
    assert "CP 1, DP 1;" in run("tiny-pp2").stdout
    assert "CP 2 (zigzag), DP 1;" in run("quickstart").stdout


def test_a_step_is_told_with_its_memory_and_traffic():
    said = run("quickstart", "--cp-comm-type", "ulysses").stdout
    for words in ("CP 2 (ulysses)", "matrix products", "memory of the fullest rank", "inside the node"):
        assert words in said


def test_rounds_are_as_long_as_ranks_compute_between_exchanges(monkeypatch):
    calls = []
    # a call takes 2 ms
    monkeypatch.setattr(calibrate.time, "perf_counter", lambda: 2e-3 * len(calls))
    seconds = calibrate._seconds(SingleFabric(), torch.device("cpu"), {"call": lambda: calls.append(None)})
    assert seconds == {"call": pytest.approx(2e-3)}
    assert len(calls) == 2 + calibrate.ROUNDS * calibrate.SWEEPS * round(calibrate.ROUND_SECONDS / 2e-3)


def test_a_spell_in_which_the_machine_is_slow_does_not_count(monkeypatch):
    times = [0.0]
    sweep = 2 * calibrate.ROUNDS

    def call():
        # as long as a sweep takes, from the middle of one to the middle of the next
        slow = 4 + 1.5 * sweep < len(times) <= 4 + 2.5 * sweep
        times.append(times[-1] + (0.3 if slow else 0.1))

    monkeypatch.setattr(calibrate.time, "perf_counter", lambda: times[-1])
    seconds = calibrate._seconds(SingleFabric(), torch.device("cpu"), {"one": call, "other": call})
    assert times[-1] == pytest.approx(0.1 * (4 + (calibrate.SWEEPS + 2) * sweep))
    assert seconds == pytest.approx({"one": 0.1, "other": 0.1})


def test_products_of_this_machine_are_those_of_a_linear_layer():
    rows, size = 64, 32
    product = calibrate._linear(rows, size, torch.device("cpu"), torch.float32)
    with FlopCounterMode(display=False) as counted:
        product()
    # forward, input gradient and weight gradient, two operations each per row, input and output feature
    assert counted.get_total_flops() == 3 * 2 * rows * size * calibrate.WIDER * size


def test_messages_go_beside_the_computation():
    sent = []

    class Listed(SingleFabric):
        def exchange(self, sends, recvs):
            sent.append((len(sends), len(recvs), {peer for _, peer in (*sends, *recvs)}))
            return super().exchange([], [])

    alone, beside = calibrate._messages(Listed(), torch.device("cpu"))
    alone()
    assert sent == []
    beside()
    assert sent == [(calibrate.MESSAGES, calibrate.MESSAGES, {1})]


def test_a_measured_run_stands_beside_the_estimate(here, monkeypatch):
    monkeypatch.setattr(estimate, "_train", lambda name, flags: estimate.Taken(2.0, 1e9))
    told = json.loads(run("quickstart", "--measure", "--cluster", here, "--json").stdout)
    assert told["measured"] == {"step_seconds": 2.0, "memory_bytes": 1e9}
    lines = run("quickstart", "--measure", "--cluster", here).stdout.splitlines()
    (line,) = (line for line in lines if "s per step " in line)
    assert f"{told['step_seconds'] / 2 - 1:+.1%}" in line


def test_published_figures_are_plain_numbers(monkeypatch):
    row = published.PublishedRun("Llama", "a paper", "tokens_per_s_per_gpu", 12273.0, 13502.4, None)
    monkeypatch.setattr(published, "published", lambda record: [row])
    said = run("--published").stdout
    assert "12,273 tokens/s" in said
    assert "13,502 " in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a recipe, or --published"),
        (["quickstart", "--cluster", "h100ib"], "no cluster 'h100ib'; did you mean 'h100-ib'"),
        (["models/llama3-8b"], "names no CLUSTER"),
        (["quickstart", "--cluster", "h100-ib"], "no rates of float32 matrix products"),
        (["quickstart", "--cp-comm-type", " "], "backend ' '"),
    ],
)
def test_what_cannot_be_estimated_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        raise run(*words).exception
