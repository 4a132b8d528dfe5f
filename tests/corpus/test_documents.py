import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import zstandard

from megatron_cp.corpus import pieces
from megatron_cp.corpus.documents import Bad, read
from megatron_cp.corpus.pieces import cut
from megatron_cp.corpus.sources import Source, find_sources, kind_of


def _write(path: Path, raw: bytes) -> Source:
    match path.suffix:
        case ".gz":
            raw = gzip.compress(raw)
        case ".zst":
            half = len(raw) // 2
            # two frames, as parallel compressors write
            raw = b"".join(zstandard.ZstdCompressor().compress(part) for part in (raw[:half], raw[half:]))
    path.write_bytes(raw)
    return Source(path, kind_of(path), len(raw))


def _texts(*sources: Source, fields: Sequence[str] = ("text",)) -> list[str | Bad]:
    return [text for piece in cut(sources) for text in read(piece, fields)]


def _bad(*sources: Source) -> str:
    (found,) = [text for text in _texts(*sources) if isinstance(text, Bad)]
    return str(found)


def _line(text: object, field: str = "text") -> bytes:
    return json.dumps({"id": 1, field: text}).encode() + b"\n"


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_text_file_is_one_document_and_line_ends_are_kept(tmp_path: Path, suffix: str) -> None:
    text = "äöü 漢字\r\nsecond line\n"
    assert _texts(_write(tmp_path / f"a.txt{suffix}", text.encode())) == [text]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_each_line_is_a_document_in_order(tmp_path: Path, suffix: str) -> None:
    texts = [f"document {number} 漢" * 20 for number in range(500)]
    source = _write(tmp_path / f"a.jsonl{suffix}", b"\n".join(map(_line, texts)))
    assert _texts(source) == texts


def test_lines_are_cut_into_pieces_without_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 100)
    texts = [str(number) * 7 for number in range(100)]
    source = _write(tmp_path / "a.jsonl", b"".join(map(_line, texts)) + b"broken")
    assert len(list(cut([source]))) > 10
    assert _texts(source)[:-1] == texts
    assert _bad(source).startswith(f"{source.path}, line 101: not JSON")


def test_pieces_account_for_every_byte_on_disk(tmp_path: Path) -> None:
    sources = [_write(tmp_path / name, _line("x" * 99) * 50000) for name in ("a.jsonl.gz", "b.txt", "c.jsonl", "d.txt")]
    assert sum(piece.disk_bytes for piece in cut(sources)) == sum(source.size for source in sources)


def test_field_is_selectable(tmp_path: Path) -> None:
    assert _texts(_write(tmp_path / "a.jsonl", _line("hello", "content")), fields=["content"]) == ["hello"]


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert _texts(_write(tmp_path / "a.txt", b"\xef\xbb\xbfhello")) == ["hello"]
    assert _texts(_write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + _line("hello"))) == ["hello"]


def test_python_source_is_read_in_the_encoding_it_declares(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe4'\n")
    assert _texts(Source(path, "python", 1)) == ["# -*- coding: latin-1 -*-\nx = 'ä'\n"]


def test_broken_utf8_names_file_line_and_byte(tmp_path: Path) -> None:
    source = _write(tmp_path / "a.txt", b"good\nbad \xff\n")
    assert _bad(source) == f"{source.path}, line 2: not UTF-8 at byte 9 (0xff)"
    source = _write(tmp_path / "a.jsonl", _line("good") + b'{"text": "\xff"}\n')
    assert _bad(source) == f"{source.path}, line 2: not UTF-8 at byte 10 (0xff) of the line"


@pytest.mark.parametrize(
    ("raw", "kind"),
    [(gzip.compress(b"x", mtime=0), "gzip"), ("hi".encode("utf-16"), "UTF-16"), (b"PK\x03\x04\xff", "a zip archive")],
)
def test_bytes_of_another_format_are_named(tmp_path: Path, raw: bytes, kind: str) -> None:
    for name in ("a.txt", "a.jsonl"):
        source = _write(tmp_path / name, raw)
        assert "not UTF-8 at byte" in _bad(source)
        assert f": by its first bytes it is {kind}, which its name must say or which must be conv" in _bad(source)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"{text: 1}", "not JSON: .* at column 2"),
        (b"[1, 2]", "a JSON array, not an object with a field 'text'"),
        (b'{"body": "x", "id": 1}', "no field 'text', only 'body', 'id'; choose one with --field"),
        (b'{"text": null}', "field 'text' is a JSON null, not a string"),
        (b'{"text": "\\ud83d"}', "half of a surrogate pair"),
        (b'{"text": ' + b"[" * 100_000, "not readable as JSON"),
        (b'{"text": ' + b"1" * 5000 + b"}", "not readable as JSON"),
    ],
)
def test_bad_line_is_named_by_file_and_number_and_the_next_is_read(tmp_path: Path, line: bytes, why: str) -> None:
    source = _write(tmp_path / "a.jsonl", _line("one") + b"\n" + line + b"\n" + _line("four"))
    first, bad, last = _texts(source)
    assert (first, last) == ("one", "four")
    assert isinstance(bad, Bad)
    assert bad.where == f"{source.path}, line 3"
    with pytest.raises(ValueError, match=why):
        raise ValueError(bad.why)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("damage", ["truncated", "not compressed"])
def test_damaged_compressed_file_is_bad_and_never_a_shorter_text(tmp_path: Path, name: str, damage: str) -> None:
    source = _write(tmp_path / name, b"".join(_line("x" * number) for number in range(1000)))
    whole = source.path.read_bytes()
    source.path.write_bytes(whole[:-9] if damage == "truncated" else b"plain text, not compressed at all")
    assert str(source.path) in _bad(source)
    assert "damaged compressed file" in _bad(source)


def test_vanished_file_is_bad(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl"):
        source = _write(tmp_path / name, b"x")
        source.path.unlink()
        assert "No such file" in _bad(source)


def test_a_folder_reads_like_its_files(tmp_path: Path) -> None:
    _write(tmp_path / "b.txt", b"bee")
    _write(tmp_path / "a.jsonl", _line("one") + _line("two"))
    _write(tmp_path / "c.txt.gz", b"sea")
    assert _texts(*find_sources([str(tmp_path)]).sources) == ["one", "two", "bee", "sea"]
