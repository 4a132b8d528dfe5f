import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from megatron_cp.cli import app
from megatron_cp.cli.data import parse_size
from tests.corpus.reading import ids_of, jsonl, texts_of


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["data", *map(str, arguments)], catch_exceptions=True)


def _built(*arguments: object) -> str:
    result = _run("build", *arguments)
    assert result.exit_code == 0, result.exception
    return result.stdout


def test_build_reports_and_prints_the_flags_to_train_with(tmp_path: Path) -> None:
    output = _built("--input", jsonl(tmp_path / "a.jsonl", ["one", "two", ""]), "--output", tmp_path / "out")
    assert "2 documents, 8 tokens as uint16, from 6 bytes of text in 1 file\n" in output
    assert "documents/s" in output
    assert "tokens/s" in output
    assert "left out, without text: 1" in output
    flags = f"--data-path {tmp_path / 'out'} --tokenizer-type NullTokenizer --vocab-size 257"
    assert f"train with: {flags} --null-tokenizer-eod-id 256\n" in output


def test_lines_of_a_json_file_are_documents(tmp_path: Path) -> None:
    (tmp_path / "c4.json").write_text('{"text": "a", "n": {"b": "c"}}\n{"text": "b", "n": {"b": "d"}}\n')
    assert "2 documents, 4 tokens" in _built("--input", tmp_path / "c4.json", "--output", tmp_path / "out")
    assert texts_of(tmp_path / "out") == ["a", "b"]
    _built("--input", tmp_path / "c4.json", "--field", "text", "--field", "n.b", "--output", tmp_path / "two")
    assert texts_of(tmp_path / "two") == ["a\nc", "b\nd"]


def test_paths_that_are_no_regular_files_are_counted_and_shown(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", ["one"])
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "gone")
    output = _built("--input", tmp_path, "--output", tmp_path / "out")
    assert f"left out, no regular files: 1\n  {tmp_path / 'link.jsonl'}\n" in output


def test_inputs_may_follow_one_another(tmp_path: Path) -> None:
    a, b, c = (jsonl(tmp_path / f"{name}.jsonl", [name]) for name in "abc")
    _built("--input", c, a, b, "--output", tmp_path / "out")
    assert texts_of(tmp_path / "out") == ["c", "a", "b"]
    _built("--input", c, "--input", b, "--output", tmp_path / "twice")
    assert texts_of(tmp_path / "twice") == ["c", "b"]


def test_standard_library_is_a_corpus(tmp_path: Path) -> None:
    output = _built("--input", "python-stdlib", "--output", tmp_path / "out", "--max-bytes", "100K")
    assert "stopped at the limit" in output
    assert texts_of(tmp_path / "out")[0].startswith('"""Record of phased-in incompatible language changes.')


def test_bad_documents_are_counted_and_the_first_are_shown(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["good", *range(7)])
    output = _built("--input", source, "--output", tmp_path / "out", "--skip-bad")
    assert f"left out, bad: 7\n  {source}, line 2: field 'text' is a JSON number" in output
    assert "  and 2 more" in output


def test_options_reach_the_corpus(tmp_path: Path) -> None:
    (tmp_path / "a.x").write_text("a text, whatever the suffix of the file.")
    (tmp_path / "b.jsonl").write_text('{"body": "hello"}\n{"body": "again"}\n')
    options = ["--glob", "*.jsonl", "--field", "body", "--limit", 1, "--eod-id", 0, "--dtype", "int32", "--workers", 2]
    output = _built("--input", tmp_path, "--output", tmp_path / "out", *options)
    assert "1 document, 6 tokens as int32" in output
    assert "workers: 2" in output
    assert "--null-tokenizer-eod-id 0" in output
    assert _run("build", "--input", tmp_path, "--output", tmp_path / "out").exit_code == 1
    again = _built("--input", tmp_path / "a.x", "--output", tmp_path / "out", "--overwrite", "--no-append-eod")
    assert "1 document, 40 tokens as uint16" in again


def test_info_says_what_is_there(tmp_path: Path) -> None:
    _built("--input", jsonl(tmp_path / "a.jsonl", ["héllo", "x"]), "--output", tmp_path / "out")
    result = _run("info", tmp_path / "out")
    assert result.stdout.splitlines() == [
        "documents  2",
        "tokens     9 (uint16, 18 bytes)",
        "longest    7 tokens",
        "first ids  104 195 169 108 108 111 256",
        "as bytes   'héllo'",
    ]


def test_refusals_are_one_line_on_stderr_with_exit_code_1(tmp_path: Path) -> None:
    command = f"data build --input {tmp_path}/nowhere --output {tmp_path}/out"
    result = subprocess.run(
        [sys.executable, "-m", "megatron_cp", *shlex.split(command)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == f"megatron-cp: input '{tmp_path}/nowhere' does not exist"
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "no input; name files"),
        (["--input", "{folder}/a.jsonl", "--tokenizer", "nothing"], "neither 'byte' nor an existing file"),
        (["--input", "{folder}/a.jsonl", "--dtype", "int8"], "--dtype int8 is not one of"),
        (["--input", "{folder}/a.jsonl", "--eod-id", "999"], "not in the vocabulary of byte"),
        (["--input", "{folder}/a.jsonl", "--field", "body"], "no field 'body', only 'text'"),
    ],
)
def test_wrong_options_are_refused_and_leave_nothing(tmp_path: Path, arguments: list[str], why: str) -> None:
    jsonl(tmp_path / "a.jsonl", ["x"])
    filled = [argument.format(folder=tmp_path) for argument in arguments]
    result = _run("build", *filled, "--output", tmp_path / "out")
    assert isinstance(result.exception, ValueError)
    assert why in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("text", "size"), [("500", 500), ("20k", 20_000), ("1.5MB", 1_500_000), ("2 G", None), ("", None)]
)
def test_sizes(text: str, size: int | None) -> None:
    if size is None:
        with pytest.raises(Exception, match="is not a size such as"):
            parse_size(text)
    else:
        assert parse_size(text) == size


def test_balance_compares_layouts_of_documents_of_a_corpus(tmp_path: Path) -> None:
    texts = ["a" * 700, *("b" * 30 for _ in range(40))]
    _built("--input", jsonl(tmp_path / "a.jsonl", texts), "--output", tmp_path / "out")
    result = _run("balance", "--seq", 1024, "--ranks", "4,8", "--documents", tmp_path / "out", "--json")
    rows = {(row["ranks"], row["layout"]): row for row in json.loads(result.stdout)}
    assert set(rows) == {(ranks, name) for ranks in (4, 8) for name in ("stream", "document", "blocks")}
    assert rows[4, "blocks"]["work"] < 1.1 < 1.5 < rows[4, "stream"]["work"]
    assert rows[4, "document"]["received"] > rows[4, "blocks"]["received"]


def test_balance_reads_lengths_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "lengths.txt").write_text("100\n20\n8\n" * 40)
    shown = _run("balance", "--seq", 512, "--ranks", "2", "--documents", tmp_path / "lengths.txt", "--streams", 3)
    assert "3 streams of 512 tokens, 12 documents each" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "8;9"], "--ranks takes whole numbers of 1 or more, as 8,32,64, got '8;9'"),
        (["--ranks", "2", "--seq", "4096"], "the documents hold less than --seq 4096 tokens"),
        (["--ranks", "3"], "needs S divisible by"),
        (["--ranks", "2", "--documents", "{folder}/words.txt"], "must hold the tokens of each document, got three"),
        (["--ranks", "2", "--documents", "{folder}/nothing"], "not found; build it with"),
    ],
)
def test_balance_refuses_in_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "lengths.txt").write_text("100 20 8 " * 8)
    (tmp_path / "words.txt").write_text("100 three")
    given = [word.format(folder=tmp_path) for word in arguments]
    result = _run("balance", "--seq", 512, "--documents", tmp_path / "lengths.txt", *given)
    assert message in str(result.exception)


@pytest.mark.parametrize("workers", [1, 2])
def test_long_texts_are_cut_into_documents(tmp_path: Path, workers: int) -> None:
    source = jsonl(tmp_path / "texts.jsonl", ["a" * 10, "b" * 3, "c" * 4])
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    _built("--input", source, "--output", whole, "--workers", workers)
    output = _built("--input", source, "--output", cut, "--workers", workers, "--split-documents", 4)
    assert "cut into several documents: 2 texts" in output
    assert "6 documents, 20 tokens as uint16, from 17 bytes of text" in output
    # the end of a text is a token of its last document
    assert cut.with_suffix(".bin").read_bytes() == whole.with_suffix(".bin").read_bytes()
    assert [len(ids) for ids in ids_of(cut)] == [4, 4, 3, 4, 4, 1]
