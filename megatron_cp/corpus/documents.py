"""Reading documents: files become pieces of work of about a megabyte, pieces become texts."""

import io
import json
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatron_cp.corpus.compressed import decompression_errors, open_binary, position
from megatron_cp.corpus.sources import Source

PIECE_BYTES = 1 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Bad(NamedTuple):
    """A file or a line without a usable document: where, and why."""

    where: str
    why: str

    def __str__(self) -> str:
        return f"{self.where}: {self.why}"


class Files(NamedTuple):
    """Files that hold one document each; a worker opens them."""

    sources: tuple[Source, ...]
    disk_bytes: int


class Lines(NamedTuple):
    """Consecutive lines of a .jsonl file, numbered from `first`; `broken` says why nothing follows them."""

    path: Path
    first: int
    raw: bytes
    disk_bytes: int
    broken: str = ""


Piece = Files | Lines


def cut(sources: Iterable[Source]) -> Iterator[Piece]:
    """Pieces of about a megabyte, in the order of the sources: where they are cut depends on the files alone."""
    waiting: list[Source] = []
    for source in sources:
        if waiting and (source.kind == "jsonl" or sum(each.size for each in waiting) >= PIECE_BYTES):
            yield _files(waiting)
            waiting = []
        if source.kind == "jsonl":
            yield from _cut_lines(source.path)
        else:
            waiting.append(source)
    if waiting:
        yield _files(waiting)


def read(piece: Piece, field: str) -> Iterator[str | Bad]:
    """The texts of a piece, or what is wrong in their place."""
    return _read_files(piece) if isinstance(piece, Files) else _read_lines(piece, field)


def _files(sources: list[Source]) -> Files:
    return Files(tuple(sources), sum(source.size for source in sources))


def _cut_lines(path: Path) -> Iterator[Lines]:
    first, before = 1, 0
    try:
        with path.open("rb") as file:
            stream = open_binary(file, path)
            while lines := stream.readlines(PIECE_BYTES):
                after = position(file)
                yield Lines(path, first, b"".join(lines), after - before)
                first, before = first + len(lines), after
    except decompression_errors() as error:
        yield Lines(path, first, b"", 0, broken=f"damaged compressed file: {error}")
    except OSError as error:
        yield Lines(path, first, b"", 0, broken=_system_error(error))


def _read_files(piece: Files) -> Iterator[str | Bad]:
    for source in piece.sources:
        try:
            with source.path.open("rb") as file:
                raw = open_binary(file, source.path).read()
        except decompression_errors() as error:
            yield Bad(str(source.path), f"damaged compressed file: {error}")
        except OSError as error:
            yield Bad(str(source.path), _system_error(error))
        else:
            yield _decode(raw, str(source.path), _python_encoding(raw) if source.kind == "python" else "utf-8")


def _system_error(error: OSError) -> str:
    return error.strerror or str(error)


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
        return Bad(f"{where}, line {line}", f"not {encoding.upper()} at byte {start} (0x{raw[start]:02x})")


def _read_lines(piece: Lines, field: str) -> Iterator[str | Bad]:
    for number, raw in enumerate(piece.raw.split(b"\n"), piece.first):
        if raw.strip():
            yield _read_line(raw, f"{piece.path}, line {number}", field)
    if piece.broken:
        yield Bad(f"{piece.path}, after line {piece.first - 1}", piece.broken)


def _read_line(raw: bytes, where: str, field: str) -> str | Bad:
    line = _decode(raw, where)
    if isinstance(line, Bad):
        return Bad(where, f"{line.why} of the line")
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        return Bad(where, f"not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return Bad(where, f"not readable as JSON: {error}")
    return _text_of(record, where, field)


def _text_of(record: Any, where: str, field: str) -> str | Bad:
    if not isinstance(record, dict):
        return Bad(where, f"a JSON {_json_type(record)}, not an object with a field {field!r}")
    if field not in record:
        return Bad(where, f"no field {field!r}, only {', '.join(map(repr, record)) or 'none'}; choose one with --field")
    text = record[field]
    if not isinstance(text, str):
        return Bad(where, f"field {field!r} is a JSON {_json_type(text)}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        return Bad(where, f"field {field!r} holds half of a surrogate pair, which is no Unicode text")
    return text


def _json_type(value: Any) -> str:
    names = {type(None): "null", bool: "boolean", int: "number", float: "number", str: "string", list: "array"}
    return names.get(type(value), "object")
