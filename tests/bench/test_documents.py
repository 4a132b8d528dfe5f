"""The bench of document layouts: candidates in turns with the results of one rank, and no times of different ones."""

import pytest
import torch
from typer.testing import CliRunner

from megatron_cp.bench import documents
from megatron_cp.bench.comparison import AttentionShape, WrongResultError
from megatron_cp.bench.documents import ONE_RANK, DocumentsBench, measure
from megatron_cp.cli import app
from megatron_cp.comm import in_process


def measured():
    bench = DocumentsBench(
        shape=AttentionShape(64, heads=2, kv_heads=2, head_dim=8, dtype="float64"),
        streams=[[0, 40, 43, 64], [0, 9, 64]],
        cases=[("zigzag", "stream"), ("all-gather", "stream"), ("all-gather", "blocks")],
        kernel="reference",
        rounds=2,
    )
    return in_process(2, lambda fabric: measure(fabric, torch.device("cpu"), bench))


def test_each_layout_has_its_figures():
    for found in measured():
        assert [(each.backend, each.layout) for each in found] == [
            (ONE_RANK, "stream"),
            ("zigzag", "stream"),
            ("all-gather", "stream"),
            ("all-gather", "blocks"),
        ]
        assert all(each.forward > 0 and each.backward > 0 and each.max_error < 1e-12 for each in found)
        assert found[0].sent == 0
        assert min(each.sent for each in found[1:]) > 0
        assert found[3].work < found[2].work == found[1].work


def test_results_that_differ_are_not_timed(monkeypatch):
    monkeypatch.setitem(documents.LARGEST_ERROR, torch.float64, -1.0)
    with pytest.raises(WrongResultError, match="one rank on document layout 'stream' deviates from one rank by"):
        measured()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--layout", "auto"], "unknown document layout 'auto'"),
        (["--backend", "ring"], "works on a layout of its own"),
        (["--seq", "1002"], "--seq must be divisible by 2 * --ranks = 4, got 1002; use 1000"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
    ],
)
def test_what_cannot_be_timed_is_refused(words, text):
    assert text in str(CliRunner().invoke(app, ["bench", "documents", *words]).exception)
