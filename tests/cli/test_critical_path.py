import json

import pytest
from typer.testing import CliRunner

from megatron_cp.cli import app

SMALL = ("--ranks", "4", "--heads", "2", "--head-dim", "16")


def run(*words):
    return CliRunner().invoke(app, ["critical-path", *SMALL, *words])


def test_stripes_are_shown_by_length():
    result = run("--backend", "zigzag", "--backend", "striped", "--seq", "1024", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [(one["backend"], one["stripe"]) for one in found] == [
        ("ring", 1),
        ("zigzag", 1),
        *(("striped", stripe) for stripe in (1, 32, 64, 128)),
    ]


def test_zigzag_is_shorter_than_ring_where_products_count_more_than_calls():
    result = run("--backend", "zigzag", "--seq", "8192", "--json")
    assert result.exit_code == 0, result.output
    ring, zigzag = (one["forward"] + one["backward"] for one in json.loads(result.stdout))
    assert 0 < zigzag < ring


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--backend", "rsa"], "backend 'rsa' computes without a kernel"),
        (["--backend", "zigzog"], "did you mean 'zigzag'"),
        (["--dtype", "int8"], "unknown --dtype 'int8'"),
        (["--seq", "1022"], "needs S divisible by context_parallel_size = 4"),
    ],
)
def test_bad_input_is_refused(words, message):
    result = run(*words)
    assert result.exit_code != 0
    assert message in str(result.exception)


def test_another_backend_can_come_first():
    result = run("--backend", "zigzag", "--against", "all-gather", "--seq", "256", "--json")
    assert result.exit_code == 0, result.output
    assert [one["backend"] for one in json.loads(result.stdout)] == ["all-gather", "zigzag"]
