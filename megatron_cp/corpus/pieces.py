"""Cut files into pieces of work of about a megabyte, which workers read."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from megatron_cp.corpus import parquet
from megatron_cp.corpus.compressed import BLOCK_BYTES, open_binary, position, reading_errors
from megatron_cp.corpus.sources import BYTE_ORDER_MARK, Source

PIECE_BYTES = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")


class Files(NamedTuple):
    """Files that hold one document each; a worker opens them."""

    sources: tuple[Source, ...]
    disk_bytes: int


class Lines(NamedTuple):
    """JSON values, one per line, numbered from `first`; `broken` says why nothing follows them.

    `unit` names them in messages: a line of the file, or an element of its array.
    """

    path: Path
    first: int
    raw: bytes
    disk_bytes: int
    broken: str = ""
    unit: str = "line"


class Rows(NamedTuple):
    """One row group of a parquet file, whose rows are numbered from `first`; a worker reads it."""

    path: Path
    group: int
    first: int
    disk_bytes: int
    broken: str = ""


Piece = Files | Lines | Rows


def cut(sources: Iterable[Source]) -> Iterator[Piece]:
    """Yield pieces of about a megabyte, in the order of the sources; only the files decide where they are cut.

    Raises RuntimeError for a parquet file where pyarrow is not installed.
    """
    waiting: list[Source] = []
    for source in sources:
        if waiting and (source.kind in CUT or sum(each.size for each in waiting) >= PIECE_BYTES):
            yield _files(waiting)
            waiting = []
        if source.kind in CUT:
            yield from CUT[source.kind](source.path)
        else:
            waiting.append(source)
    if waiting:
        yield _files(waiting)


def _files(sources: list[Source]) -> Files:
    return Files(tuple(sources), sum(source.size for source in sources))


def _cut_lines(path: Path) -> Iterator[Lines]:
    return _cut_open(path, _line_pieces)


def _cut_json(path: Path) -> Iterator[Lines]:
    return _cut_open(path, _json_pieces)


class _Stream:
    """The plain bytes of a file, block by block; `error` says why it ended early, and what came before counts."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self.path, self.error = path, ""
        self._file, self._plain, self._before = file, open_binary(file, path), 0

    def blocks(self) -> Iterator[bytes]:
        try:
            # read1, not read: an error does not take the bytes before it along
            while block := self._plain.read1(BLOCK_BYTES):  # type: ignore[attr-defined]
                yield block
        except reading_errors() as error:
            self.error = failure(error)

    def disk_bytes(self) -> int:
        """Return the bytes read from disk since the last call."""
        before, self._before = self._before, position(self._file)
        return self._before - before


def _cut_open(path: Path, pieces: Callable[[_Stream], Iterator[Lines]]) -> Iterator[Lines]:
    try:
        with path.open("rb") as file:
            yield from pieces(_Stream(file, path))
    except OSError as error:
        yield Lines(path, 1, b"", 0, broken=failure(error))


def _line_pieces(stream: _Stream, blocks: Iterable[bytes] | None = None) -> Iterator[Lines]:
    first, held, searched = 1, bytearray(), 0
    for block in stream.blocks() if blocks is None else blocks:
        held += block
        while len(held) >= PIECE_BYTES and (end := held.find(b"\n", max(PIECE_BYTES - 1, searched)) + 1):
            yield Lines(stream.path, first, bytes(held[:end]), stream.disk_bytes())
            first, searched = first + held.count(b"\n", 0, end), 0
            del held[:end]
        searched = len(held)
    if stream.error:
        # the line that the damage cuts off is no document
        del held[held.rfind(b"\n") + 1 :]
    yield Lines(stream.path, first, bytes(held), stream.disk_bytes())
    if stream.error:
        yield Lines(stream.path, first + held.count(b"\n"), b"", 0, broken=stream.error)


def _json_pieces(stream: _Stream) -> Iterator[Lines]:
    """Cut a .json file: an array into elements, an object over several lines by itself, all else into lines."""
    blocks = stream.blocks()
    head = bytearray()
    for block in blocks:
        head += block
        if b"\n" in head.lstrip() or len(head) >= PIECE_BYTES:
            break
    begin = head.removeprefix(BYTE_ORDER_MARK).lstrip()
    if begin[:1] == b"[" or _goes_on(bytes(begin.partition(b"\n")[0])):
        yield from _element_pieces(stream, b"".join((head, *blocks)))
    else:
        yield from _line_pieces(stream, _chain(bytes(head), blocks))


def _chain(head: bytes, blocks: Iterable[bytes]) -> Iterator[bytes]:
    yield head
    yield from blocks


def _goes_on(line: bytes) -> bool:
    """True if a line begins a JSON object and ends before the object does."""
    try:
        text = line.decode().rstrip()
        json.loads(text)
    except json.JSONDecodeError as error:
        return text[:1] == "{" and error.pos >= len(text)
    except (ValueError, RecursionError):
        pass
    return False


def _element_pieces(stream: _Stream, raw: bytes) -> Iterator[Lines]:
    """Put the elements of an array, or objects that follow one another, on a line each.

    A line end inside a JSON value is white space between its tokens, for a string holds none.
    """
    first, count, held, size = 1, 0, [], 0
    elements = _Elements(raw.removeprefix(BYTE_ORDER_MARK).decode(errors="surrogateescape"))
    for element in elements:
        held.append(element.encode(errors="surrogateescape").replace(b"\n", b" "))
        size, count = size + len(held[-1]), count + 1
        if size >= PIECE_BYTES:
            yield Lines(stream.path, first, b"\n".join(held), stream.disk_bytes(), unit="element")
            first, held, size = first + count, [], 0
            count = 0
    yield Lines(stream.path, first, b"\n".join(held), stream.disk_bytes(), unit="element")
    # what the damage cuts off is no JSON either, and the damage is the reason
    if broken := stream.error or elements.error:
        yield Lines(stream.path, first + count, b"", 0, broken=broken, unit="element")


class _Elements:
    """The values of a JSON text, those of an array one by one; `error` says why the text ends early."""

    def __init__(self, text: str) -> None:
        self._text, self.error = text, ""

    def __iter__(self) -> Iterator[str]:
        decode, text = json.JSONDecoder().raw_decode, self._text
        position = _after_space(text, 0)
        array = text[position : position + 1] == "["
        position = _after_space(text, position + array)
        while position < len(text) and text[position] != "]":
            try:
                _, end = decode(text, position)
            except json.JSONDecodeError as error:
                self.error = f"not JSON: {error.msg.removesuffix(' at')} at line {error.lineno}, column {error.colno}"
                return
            except (ValueError, RecursionError) as error:
                self.error = f"not readable as JSON: {error}"
                return
            yield text[position:end]
            position = _after_space(text, end)
            if array and text[position : position + 1] == ",":
                position = _after_space(text, position + 1)
            elif array and text[position : position + 1] != "]":
                self.error = "not JSON: the array does not end"
                return
        if array and _after_space(text, position + 1) < len(text):
            self.error = "not JSON: something follows the array"
        elif array and position >= len(text):
            self.error = "not JSON: the array does not end"


def _after_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _cut_rows(path: Path) -> Iterator[Rows]:
    first = 1
    try:
        for number, group in enumerate(parquet.groups(path)):
            yield Rows(path, number, first, group.disk_bytes)
            first += group.rows
    except parquet.damage() as error:
        yield Rows(path, 0, first, 0, broken=f"not a whole parquet file: {one_line(error)}")


def failure(error: Exception) -> str:
    """Say why a file cannot be read on: the system's reason, or that of a decompressor."""
    # the decompressors raise OSError too, without the system's number
    return getattr(error, "strerror", None) or f"damaged compressed file: {error}"


def one_line(error: BaseException) -> str:
    """Return the text of an error in one line."""
    return " ".join(str(error).split())


CUT: dict[str, Callable[[Path], Iterator[Piece]]] = {"jsonl": _cut_lines, "json": _cut_json, "parquet": _cut_rows}
