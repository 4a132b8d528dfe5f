"""Files of every format that corpora are published in: read right, or named by what cannot be read."""

import bz2
import gzip
import json
import lzma
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from megatron_cp.corpus import pieces
from megatron_cp.corpus.documents import Bad, read
from megatron_cp.corpus.pieces import cut
from megatron_cp.corpus.sources import Source, find_sources, kind_of

TEXTS = [f'text {number} [with] {{braces}}, "quotes" and 漢字\nin two lines' for number in range(40)]
RECORDS = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": lambda raw: zstandard.ZstdCompressor().compress(raw),
    ".bz2": bz2.compress,
    # quick, as the files are large
    ".xz": lambda raw: lzma.compress(raw, preset=0),
}
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)


def _write(path: Path, content: str | bytes) -> Source:
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(raw))
    return Source(path, kind_of(path), path.stat().st_size)


def _texts(*sources: Source, fields: tuple[str, ...] = ("text",)) -> list[str | Bad]:
    return [text for piece in cut(sources) for text in read(piece, fields)]


def _split(found: list[str | Bad]) -> tuple[list[str], list[str]]:
    return [text for text in found if isinstance(text, str)], [str(bad) for bad in found if isinstance(bad, Bad)]


@pytest.mark.parametrize(
    ("suffix", "packed"),
    [
        (".gzip", COMPRESS[".gz"]),
        (".zstd", COMPRESS[".zst"]),
        (".lzma", lambda raw: lzma.compress(raw, lzma.FORMAT_ALONE)),
    ],
)
def test_other_suffixes_of_a_compression_are_read(
    tmp_path: Path, suffix: str, packed: Callable[[bytes], bytes]
) -> None:
    assert _texts(_write(tmp_path / f"c4.jsonl{suffix}", packed(LINES.encode()))) == TEXTS


@pytest.mark.parametrize("suffix", ["", *COMPRESS])
@pytest.mark.parametrize(
    "content",
    [LINES, LINES.replace("\n", "\r\n"), json.dumps(RECORDS), json.dumps(RECORDS, indent=2), "\n \n" + LINES],
    ids=["lines", "crlf", "array", "pretty-array", "blank-lines-first"],
)
@pytest.mark.parametrize("piece_bytes", [100, 1 << 20])
def test_json_file_holds_a_document_per_line_or_element(
    tmp_path: Path, suffix: str, content: str, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", piece_bytes)
    source = _write(tmp_path / f"c4-train.00000.json{suffix}", content)
    assert _texts(source) == TEXTS
    assert sum(piece.disk_bytes for piece in cut([source])) == source.size


def test_pretty_printed_object_is_one_document(tmp_path: Path) -> None:
    assert _texts(_write(tmp_path / "a.json", json.dumps(RECORDS[0], indent=2))) == TEXTS[:1]
    objects = "\n".join(json.dumps(record, indent=2) for record in RECORDS)
    assert _texts(_write(tmp_path / "b.json", objects)) == TEXTS


def test_byte_order_mark_of_a_json_file_is_no_text(tmp_path: Path) -> None:
    for content in (LINES, json.dumps(RECORDS)):
        assert _texts(_write(tmp_path / "a.json", b"\xef\xbb\xbf" + content.encode())) == TEXTS


@pytest.mark.parametrize(
    ("content", "before", "why"),
    [
        ("some text\n", 0, "a.json, line 1: not JSON"),
        ('{"text": "a"}\n{"text": b}\n{"text": "c"}\n', 2, "a.json, line 2: not JSON: .* column 10"),
        ('{"text": "a"}\n{"text": "b\n', 1, "line 2: not JSON: Unterminated string starting at column 10"),
        ('{"text": a}\n{"text": "b"}\n', 1, "a.json, line 1: not JSON"),
        ('[{"text": "a"},\n {"text": b}]', 1, "a.json, after element 1: not JSON: .* line 2, column 11"),
        ('[{"text": "a"}, {"text": "b"}', 2, "a.json, after element 2: not JSON: the array does not end"),
        ('[{"text": "a"},', 1, "a.json, after element 1: not JSON: the array does not end"),
        ('[{"text": "a"} {"text": "b"}]', 1, "a.json, after element 1: not JSON: the array does not end"),
        ('[{"text": "a"}] [1]', 1, "a.json, after element 1: not JSON: something follows the array"),
        ('[{"text": "a"}, 3, {"text": "b"}]', 2, "a.json, element 2: a JSON number, not an object"),
        ('["a", "b"]', 0, "a.json, element 1: a JSON string, not an object with a field 'text'"),
        ('"a"', 0, "a.json, line 1: a JSON string"),
        ("[" * 100_000, 0, "a.json, after element 0: not readable as JSON"),
    ],
)
def test_damaged_json_keeps_what_is_before_the_damage(tmp_path: Path, content: str, before: int, why: str) -> None:
    texts, bad = _split(_texts(_write(tmp_path / "a.json", content)))
    assert len(texts) == before
    with pytest.raises(ValueError, match=why):
        raise ValueError(bad[0])


def test_element_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    source = _write(tmp_path / "a.json", b'[{"text": "a"}, {"text": "\xff"}, {"text": "c"}]')
    texts, bad = _split(_texts(source))
    assert texts == ["a", "c"]
    assert bad == [f"{source.path}, element 2: not UTF-8 at byte 10 (0xff) of the element"]


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_compressed_file_cut_off_keeps_the_lines_before(tmp_path: Path, suffix: str, kind: str) -> None:
    # incompressible, so that the cut falls near the middle
    lines = [json.dumps({"text": os.urandom(5000).hex()}) + "\n" for _ in range(400)]
    source = _write(tmp_path / f"a.{kind}{suffix}", "".join(lines))
    whole = source.path.read_bytes()
    source.path.write_bytes(whole[: len(whole) // 2])
    texts, bad = _split(_texts(source))
    assert texts == [json.loads(line)["text"] for line in lines[: len(texts)]]
    # bzip2 gives a block of 900 kB only when it is complete
    assert 100 < len(texts) < 210
    (why,) = bad
    assert why.startswith(f"{source.path}, after line {len(texts)}: damaged compressed file: ")


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_file_that_is_not_compressed_as_its_name_says_is_bad(tmp_path: Path, suffix: str, name: str) -> None:
    path = tmp_path / (name + suffix)
    path.write_bytes(b"plain text, not compressed at all")
    texts, (why,) = _split(_texts(Source(path, kind_of(path), 1)))
    assert texts == []
    assert "damaged compressed file" in why


@pytest.mark.parametrize(
    "name", ["a.tar", "a.tar.gz", "a.tgz", "a.zip", "a.jsonl.lz4", "a.arrow", "a.txt.br", "a.csv", "a.tsv.gz", "a.warc"]
)
def test_archives_and_unknown_compressions_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"which is not read; unpack or convert it\. Read are .*\.zst.*\.xz"):
        find_sources([str(tmp_path / name)])


def test_nested_and_several_fields(tmp_path: Path) -> None:
    record = {"a": {"b": {"c": "deep"}, "n": 1}, "x.y": "dotted", "q": "question", "r": "answer"}
    source = _write(tmp_path / "a.jsonl", json.dumps(record) + "\n")
    for fields, expected in (
        (("a.b.c",), "deep"),
        (("x.y",), "dotted"),
        (("q", "r"), "question\nanswer"),
        (("r", "a.b.c", "q"), "answer\ndeep\nquestion"),
    ):
        assert _texts(source, fields=fields) == [expected]
    for field, why in (
        ("a.z", "line 1, in 'a': no field 'z', only 'b', 'n'; choose one with --field"),
        ("a.n", "field 'n' is a JSON number, not a string"),
        ("q.r", "field 'q' is a JSON string, not an object with a field 'r'"),
        ("a", "field 'a' is a JSON object, not a string"),
        ("z.a", "no field 'z.a', only 'a', 'x.y', 'q', 'r'"),
    ):
        (bad,) = _texts(source, fields=(field,))
        assert why in str(bad)


def _parquet(path: Path, rows: list[dict[str, Any]], group: int = 16) -> Source:
    arrow = pytest.importorskip("pyarrow", reason="parquet needs the extra megatron-cp[parquet]")
    import pyarrow.parquet

    pyarrow.parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=group, write_page_checksum=True)
    return Source(path, kind_of(path), path.stat().st_size)


def test_parquet_file_holds_a_document_per_row(tmp_path: Path) -> None:
    source = _parquet(tmp_path / "a.parquet", RECORDS)
    assert _texts(source) == TEXTS
    assert len(list(cut([source]))) == 3
    assert _texts(_parquet(tmp_path / "b.parquet", [{"text": text.encode()} for text in TEXTS])) == TEXTS


def test_parquet_fields_are_nested_and_named(tmp_path: Path) -> None:
    source = _parquet(
        tmp_path / "a.parquet", [{"meta": {"title": "T", "n": 1}, "text": "x"}, {"meta": None, "text": None}]
    )
    assert _texts(source, fields=("meta.title", "text"))[0] == "T\nx"
    texts, (why,) = _split(_texts(source))
    assert texts == ["x"]
    assert why == f"{source.path}, row 2: field 'text' is a JSON null, not a string"
    (first, _) = _texts(source, fields=("body",))
    assert str(first) == f"{source.path}, row 1: no field 'body', only 'meta', 'text'; choose one with --field"


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "inside"])
def test_damaged_parquet_is_bad_in_one_line(tmp_path: Path, damage: str) -> None:
    source = _parquet(tmp_path / "a.parquet", [{"text": os.urandom(500).hex()} for _ in range(64)])
    whole = source.path.read_bytes()
    damaged = {
        "truncated": whole[:-9],
        "garbage": os.urandom(4000),
        "empty": b"",
        "inside": whole[: len(whole) // 3] + bytes(4000) + whole[len(whole) // 3 + 4000 :],
    }
    source.path.write_bytes(damaged[damage])
    texts, bad = _split(_texts(source))
    assert len(texts) < 64
    assert bad
    assert all("\n" not in why and str(source.path) in why for why in bad)


def test_parquet_without_its_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(RuntimeError, match=r"pip install 'megatron-cp\[parquet\]'"):
        list(cut(find_sources([str(tmp_path)]).sources))


def test_patterns_name_files_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b.json", "a.json", "c.txt", "d/e.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(LINES)
    assert [source.path.name for source in find_sources([f"{tmp_path}/*.json"]).sources] == ["a.json", "b.json"]
    found = find_sources([f"{tmp_path}/**"])
    assert [source.path.name for source in found.sources] == ["a.json", "b.json", "c.txt", "e.json"]
    assert {path.name for path in found.skipped} == {"d", tmp_path.name}
    with pytest.raises(ValueError, match=r"no file matches .*\*\.xz"):
        find_sources([f"{tmp_path}/*.xz"])


def test_what_is_no_regular_file_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "link.txt").symlink_to(tmp_path / "gone")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.txt"))
        found = find_sources([str(tmp_path)])
        with pytest.raises(ValueError, match="a device or a socket; name files, folders or pipes"):
            find_sources([str(tmp_path / "socket.txt")])
    assert [source.path.name for source in found.sources] == ["a.txt"]
    assert [path.name for path in found.skipped] == ["link.txt", "pipe.txt", "socket.txt"]
    with pytest.raises(ValueError, match="'/dev/zero' is a device"):
        find_sources(["/dev/zero"])
