"""`data lengths` and `plan-batches`: what they print, draw and refuse."""

import json

import pytest
from typer.testing import CliRunner

from docs import generate
from megatron_cp.batches import ALGORITHMS, published_mixes
from megatron_cp.cli import app
from megatron_cp.corpus.mixes import MIXES, drawn

SIZES = ("--model", "llama3.2-1b", "--cluster", "h100-ib", "--ranks", "3", "--cp-tokens-per-rank", "4096")


def run(*words):
    return CliRunner().invoke(app, list(map(str, words)), catch_exceptions=True)


def printed(*words):
    result = run(*words)
    assert result.exit_code == 0, result.exception
    return result.stdout


@pytest.fixture
def documents(tmp_path):
    file = tmp_path / "lengths.txt"
    file.write_text("12000 8000 4000 100\n100 200 300 4000 4000 9000 1 2")
    return file


def test_lengths_are_counted_by_doubling(documents):
    found = json.loads(printed("data", "lengths", documents, "--json"))
    assert (found["documents"], found["tokens"]) == (12, 41703)
    assert found["quantiles"] | {"50%": 300, "100%": 12000} == found["quantiles"]
    rows = {row["least"]: (row["documents"], row["tokens"]) for row in found["doublings"]}
    assert rows | {1: (1, 1), 64: (2, 200), 512: (0, 0), 2048: (3, 12000), 8192: (2, 21000)} == rows
    assert sum(number for number, _ in rows.values()) == 12
    table = printed("data", "lengths", documents)
    assert "12 documents, 41,703 tokens" in table
    assert "░" in table


def test_a_mix_is_drawn_equally_each_time():
    for mix in MIXES:
        assert drawn(mix, 50, 10_000) == drawn(mix, 50, 10_000)
        assert max(drawn(mix, 2000, 10_000)) <= 10_000
    assert "10,000 documents" in printed("data", "lengths", "web")


def test_plans_stand_beside_both_baselines(documents):
    found = json.loads(printed("plan-batches", documents, *SIZES, "--json"))
    seconds = {plan["algorithm"]: plan["seconds"] for plan in found["plans"]}
    assert list(seconds) == ALGORITHMS.names
    assert seconds["balanced"] <= min(seconds.values()) * (1 + 1e-9)
    for plan in found["plans"]:
        assert plan["seconds"] >= plan["bound"]
        held = [at for step in plan["steps"] for slot in step["slots"] for group in slot for at in group["documents"]]
        assert sorted(held) == list(range(12))
    assert found["cut"] == 0
    assert found["tokens_per_rank"] == 4096


def test_the_table_says_what_was_cut(documents):
    words = (*SIZES, "--algorithm", "flexsp", "--global-batch-size", "6", "--steps", "2", "--seq-length", "8K")
    table = printed("plan-batches", documents, *words)
    assert "llama3.2-1b on 3 ranks of h100-ib, TP 1, PP 1: 12 documents" in table
    assert "2 documents were cut to 8,192 tokens (--seq-length)" in table
    assert "lower bound" in table
    assert [name for name in ALGORITHMS.names if name in table] == ["static", "homogeneous", "flexsp"]


@pytest.mark.slow
def test_both_commands_draw(documents, tmp_path):
    for words in (("data", "lengths", documents), ("plan-batches", documents, *SIZES, "--pp", "1")):
        file = tmp_path / f"{words[0]}.png"
        printed(*words, "--plot", file)
        assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_memory_decides_where_no_tokens_are_given(documents):
    words = ("--model", "llama3.2-1b", "--cluster", "h100-ib", "--ranks", "4", "--pp", "2", "--json")
    found = json.loads(printed("plan-batches", documents, *words))
    assert found["ranks"] == 2
    assert found["tokens_per_rank"] % 256 == 0


@pytest.mark.slow
@pytest.mark.xdist_group("published mixes")
def test_published_mixes_stand_beside_the_claims(monkeypatch):
    # planned once for the tests of the pages and this one
    monkeypatch.setattr(published_mixes, "mix_rows", lambda record: iter(generate.published_steps()))
    rows = json.loads(printed("plan-batches", "--published", "--json"))
    assert [row["mix"] for row in rows[::3]] == list(MIXES)
    for row in rows:
        assert row["seconds"]["balanced"] <= min(row["seconds"]["static"], row["seconds"]["homogeneous"])
        assert min(row["seconds"].values()) >= row["bound"]


def test_documents_and_sizes_are_asked_for():
    assert "give documents, --ranks, --model and --cluster" in str(run("plan-batches", "web").exception)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--ranks", "5", "--tp", "2"), "--ranks 5 must be a multiple of --tp 2 x --pp 1"),
        (("--algorithm", "flexps"), "unknown batch algorithm 'flexps'; did you mean 'flexsp'"),
        (("--cp-tokens-per-rank", "100"), "longer than the largest group holds, 3 ranks of 100 tokens"),
        (("--cp-comm-type", "double-ring"), "groups of any size have no grid"),
        (("--plot", "a.txt"), "--plot takes a file that ends in"),
        (("--model", "llama9"), "no model 'llama9'"),
        (("--global-batch-size", "0"), "--global-batch-size takes a positive whole number"),
    ],
)
def test_what_cannot_be_planned_is_one_line(documents, words, said):
    result = run("plan-batches", documents, *SIZES, *words)
    assert said in str(result.exception)
    assert "\n" not in str(result.exception)


@pytest.mark.parametrize(
    ("text", "said"),
    [("12 x", "must hold the tokens of each document, got x"), ("5 0 3", "1 documents without tokens")],
)
def test_lengths_that_are_none_are_one_line(tmp_path, text, said):
    file = tmp_path / "lengths.txt"
    file.write_text(text)
    for words in (("data", "lengths", file), ("plan-batches", file, *SIZES)):
        assert said in str(run(*words).exception)
