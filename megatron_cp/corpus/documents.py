"""Read the texts of pieces of files, and say what is wrong in their place."""

import io
import json
import tokenize
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from megatron_cp.corpus import parquet
from megatron_cp.corpus.compressed import open_binary, reading_errors
from megatron_cp.corpus.pieces import Files, Lines, Piece, Rows, failure, one_line
from megatron_cp.corpus.sources import BYTE_ORDER_MARK

STARTS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "parquet",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


class Bad(NamedTuple):
    """A file, line or row without a usable document: where, and why."""

    where: str
    why: str

    def __str__(self) -> str:
        return f"{self.where}: {self.why}"


def read(piece: Piece, fields: Sequence[str]) -> Iterator[str | Bad]:
    """Yield the texts of a piece, or what is wrong in their place.

    `fields` name the text of a JSON object or of a row, `a.b` the field b of the object in a; the texts of several are
    joined by a line end.
    """
    match piece:
        case Files():
            return _read_files(piece)
        case Lines():
            return _read_lines(piece, fields)
        case Rows():
            return _read_rows(piece, fields)


def _read_files(piece: Files) -> Iterator[str | Bad]:
    for source in piece.sources:
        try:
            with source.path.open("rb") as file:
                raw = open_binary(file, source.path).read()
        except reading_errors() as error:
            yield Bad(str(source.path), failure(error))
        else:
            yield _decode(raw, str(source.path), _python_encoding(raw) if source.kind == "python" else "utf-8")


def _python_encoding(raw: bytes) -> str:
    try:
        return tokenize.detect_encoding(io.BytesIO(raw).readline)[0]
    except SyntaxError:
        return "utf-8"


def _decode(raw: bytes, where: str, encoding: str = "utf-8") -> str | Bad:
    try:
        return raw.removeprefix(BYTE_ORDER_MARK).decode(encoding.removesuffix("-sig"))
    except UnicodeDecodeError as error:
        start = error.start + len(raw) - len(raw.removeprefix(BYTE_ORDER_MARK))
        line = raw.count(b"\n", 0, start) + 1
        kind = next((name for magic, name in STARTS.items() if raw.startswith(magic)), "")
        hint = f": by its first bytes it is {kind}, which its name must say or which must be converted" if kind else ""
        return Bad(f"{where}, line {line}", f"not {encoding.upper()} at byte {start} (0x{raw[start]:02x}){hint}")


def _read_lines(piece: Lines, fields: Sequence[str]) -> Iterator[str | Bad]:
    for number, raw in enumerate(piece.raw.split(b"\n"), piece.first):
        if raw.strip():
            yield _read_line(raw, f"{piece.path}, {piece.unit} {number}", piece.unit, fields)
    if piece.broken:
        yield Bad(f"{piece.path}, after {piece.unit} {piece.first - 1}", piece.broken)


def _read_line(raw: bytes, where: str, unit: str, fields: Sequence[str]) -> str | Bad:
    line = _decode(raw, where)
    if isinstance(line, Bad):
        return Bad(where, f"{line.why} of the {unit}")
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        return Bad(where, f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return Bad(where, f"not readable as JSON: {error}")
    return _text_of(record, where, fields)


def _read_rows(piece: Rows, fields: Sequence[str]) -> Iterator[str | Bad]:
    if piece.broken:
        yield Bad(str(piece.path), piece.broken)
        return
    number = piece.first
    try:
        for record in parquet.rows(piece.path, piece.group, fields):
            yield _text_of(record, f"{piece.path}, row {number}", fields)
            number += 1
    except parquet.damage() as error:
        yield Bad(f"{piece.path}, after row {number - 1}", f"damaged row group: {one_line(error)}")


def _text_of(record: Any, where: str, fields: Sequence[str]) -> str | Bad:
    if not isinstance(record, dict):
        wanted = " and ".join(map(repr, fields))
        return Bad(where, f"a JSON {_json_type(record)}, not an object with a field {wanted}")
    texts = []
    for field in fields:
        text = _field_of(record, where, field)
        if isinstance(text, Bad):
            return text
        texts.append(text)
    return "\n".join(texts)


def _field_of(record: dict[str, Any], where: str, field: str) -> str | Bad:
    name, inner = _step(record, field)
    if name not in record:
        return Bad(where, f"no field {field!r}, only {', '.join(map(repr, record)) or 'none'}; choose one with --field")
    text = record[name]
    if inner and isinstance(text, dict):
        return _field_of(text, f"{where}, in {name!r}", inner)
    if inner:
        return Bad(where, f"field {name!r} is a JSON {_json_type(text)}, not an object with a field {inner!r}")
    if not isinstance(text, str):
        return Bad(where, f"field {field!r} is a JSON {_json_type(text)}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        return Bad(where, f"field {field!r} holds half of a surrogate pair, which is no Unicode text")
    return text


def _step(record: dict[str, Any], field: str) -> tuple[str, str]:
    """Split `a.b` into the field to take now and the one below it; a field that is called `a.b` comes first."""
    if field in record:
        return field, ""
    name, _, inner = field.partition(".")
    return (name, inner) if name in record else (field, "")


def _json_type(value: Any) -> str:
    names = {type(None): "null", bool: "boolean", int: "number", float: "number", str: "string", list: "array"}
    return names.get(type(value), "object")
