"""The kernel benchmark times only what is right, and counts operations as the field does."""

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from megatron_cp.bench import kernels as bench_kernels
from megatron_cp.bench.comparison import AttentionShape
from megatron_cp.bench.kernels import bench, check, flops
from megatron_cp.cli.bench_kernels import kernels
from megatron_cp.kernels.measured import MEASURED
from megatron_cp.kernels.reference import ReferenceKernel

SMALL = {"heads": 4, "kv_heads": 2, "head_dim": 16}
WIDE = {"heads": 32, "kv_heads": 8, "head_dim": 128, "batch": 2}


@pytest.fixture
def command():
    app = typer.Typer()
    app.command()(kernels)
    return lambda *words: CliRunner().invoke(app, words)


class NoScale(ReferenceKernel):
    """A kernel whose gradient of q lacks the scale of the scores."""

    def backward(self, *args, scale, causal):
        dq, dk, dv = super().backward(*args, scale=scale, causal=causal)
        return dq / scale, dk, dv


class NotANumber(ReferenceKernel):
    def forward(self, *args, scale, causal):
        out, lse = super().forward(*args, scale=scale, causal=causal)
        return out * torch.nan, lse


@pytest.mark.parametrize(("kernel", "what"), [(NoScale(), "dq"), (NotANumber(), "out")])
def test_a_wrong_kernel_gets_no_figures(kernel, what):
    with pytest.raises(RuntimeError, match=f"is wrong on cpu: {what} deviates .* no figures for a wrong kernel"):
        check(kernel, AttentionShape(64, **SMALL), "cpu")


def test_a_causal_mask_counts_as_half_and_backward_as_two_and_a_half():
    assert flops(AttentionShape(1024, **WIDE, causal=False)) == 4 * 2 * 32 * 128 * 1024**2
    assert flops(AttentionShape(1024, **WIDE)) * 2 == flops(AttentionShape(1024, **WIDE, causal=False))
    (row,) = bench(["torch"], [AttentionShape(128, **SMALL)], "cpu", 1).rows
    forward, backward = (
        tflops * ms for tflops, ms in ((row.forward_tflops, row.forward_ms), (row.backward_tflops, row.backward_ms))
    )
    assert backward / forward == pytest.approx(2.5)
    assert forward == pytest.approx(flops(AttentionShape(128, **SMALL)) / 1e9)


def test_the_reference_is_not_timed_where_its_scores_do_not_fit(monkeypatch):
    monkeypatch.setattr(bench_kernels, "SCORE_BYTES", 4 * 64 * 64 * 4)
    rows = bench(
        ["reference"],
        [AttentionShape(64, **SMALL), AttentionShape(65, **SMALL)],
        "cpu",
        1,
    ).rows
    assert [row.skipped is None for row in rows] == [True, False]
    assert rows[1].forward_ms is None


def test_json_and_table_name_every_kernel_that_can_run(command):
    words = ("--seq", "64", "--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--rounds", "1")
    report = json.loads(command(*words, "--json").stdout)
    assert [row["kernel"] for row in report["rows"]] == ["torch", "reference"]
    assert all(row["error"] <= 2e-6 for row in report["rows"])
    table = command(*words).stdout
    assert "reference" in table
    assert "auto chose 'torch'" in table
    _, _, orders = table.partition("measured orders")
    for entry in MEASURED:
        assert f"{entry.capability[0]}.{entry.capability[1]}" in orders
        assert ", ".join(entry.order) in orders
        assert entry.op in orders


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--kernel", "troch"), "unknown kernel 'troch'; did you mean 'torch'"),
        (("--kernel", "flash"), "kernel 'flash' needs a CUDA device"),
        (("--dtype", "bfloat"), "unknown dtype 'bfloat'; did you mean 'bfloat16'"),
        (("--device", "tpu"), "unknown device 'tpu'"),
        (("--heads", "6", "--kv-heads", "4"), "query heads must be a multiple of KV heads, got 6 and 4"),
    ],
)
def test_bad_words_are_one_line(command, words, message):
    error = command(*words).exception
    assert isinstance(error, ValueError)
    assert message in str(error)


def test_a_missing_gpu_is_said(command, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device is visible; use --device cpu" in str(command("--device", "cuda").exception)
