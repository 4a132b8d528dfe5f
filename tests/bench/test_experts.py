"""The bench of experts: products in turns with equal results, and a refusal to print times of different ones."""

import json

import pytest
from typer.testing import CliRunner

from megatron_cp.bench import experts
from megatron_cp.bench.comparison import WrongResultError
from megatron_cp.bench.experts import APART, ExpertBench, measure
from megatron_cp.cli import app
from megatron_cp.experts import LOOP
from megatron_cp.experts.load import zipf

SMALL = ExpertBench(8, 40, 16, 8, 1.2, "float32", 3)


def test_each_product_has_a_time_for_each_round():
    found, choice = measure(SMALL, "cpu")
    assert found[0].product == APART
    assert LOOP in [each.product for each in found]
    assert choice.name == LOOP
    for each in found:
        assert len(each.seconds) == 3
        assert 0 < each.spread[0] <= each.median <= each.spread[1]


def test_products_that_differ_are_not_timed(monkeypatch):
    monkeypatch.setitem(experts.CLOSE, "float32", -1.0)
    with pytest.raises(WrongResultError, match=f"differs from experts {APART}"):
        measure(SMALL, "cpu")


@pytest.mark.parametrize(
    ("count", "rows", "skew"), [(64, 4096, 1.0), (8, 5, 1.2), (7, 100, 0.0), (1, 9, 2.0), (5, 0, 1.0)]
)
def test_a_load_by_zipfs_law_has_all_rows_and_falls(count, rows, skew):
    sizes = zipf(count, rows, skew)
    assert (len(sizes), sum(sizes)) == (count, rows)
    assert sizes == sorted(sizes, reverse=True)
    if not skew:
        assert max(sizes) - min(sizes) <= 1


def test_the_command_prints_what_auto_takes():
    words = "bench experts --experts 4 --rows 16 --hidden 8 --ffn 8 --rounds 1".split()
    done = CliRunner().invoke(app, [*words, "--json"])
    found = json.loads(done.stdout)
    assert found["auto"] == LOOP
    assert found["times"][0]["product"] == APART
    assert "takes loop (auto: " in " ".join(CliRunner().invoke(app, words).stdout.split())
    error = CliRunner().invoke(app, [*words, "--dtype", "float8"]).exception
    assert "unknown dtype 'float8'" in str(error)
