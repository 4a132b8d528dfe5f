"""Find the files that a corpus is made of, and their order."""

import glob
import os
import stat
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal, NamedTuple

from megatron_cp.corpus import compressed
from megatron_cp.registry import suggest

Kind = Literal["text", "jsonl", "json", "parquet", "python"]

STDLIB = "python-stdlib"
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".jsonlines": "jsonl",
    ".jl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
}
# read as plain files they would be binary, or one document of a whole table or archive with its headers
UNREAD = frozenset(
    ".7z .arrow .br .csv .feather .lz4 .lzo .orc .psv .rar .snappy .sz .tar .tgz .tbz2 .tsv .txz .warc .z .zip".split()
)
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
JSON_STARTS = (b'{"', b"[{", b'{ "', b"[ {")

# tests of the standard library hold broken encodings on purpose; the other two are not part of the library
STDLIB_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


class Source(NamedTuple):
    """One file and how to read it.

    text:    one document in UTF-8
    python:  one document in the encoding that it declares
    jsonl:   one JSON object per line, each a document
    json:    one JSON object per line, or an array of objects
    parquet: a table, each row a document
    """

    path: Path
    kind: Kind
    size: int


class Found(NamedTuple):
    """Files to read, in order, and the paths left out because they are no regular files (pipes, broken links)."""

    sources: list[Source]
    skipped: list[Path]


def find_sources(inputs: Sequence[str], globs: Sequence[str] = ()) -> Found:
    """Find the files of all inputs: files, folders with all below them, patterns such as 'data/*.json.gz'.

    `python-stdlib` stands for the source of Python's own library. Inputs stay in the order given; the files of a folder
    or of a pattern are sorted by path; folders that a pattern matches are left out. Folders contribute the names with
    known suffixes, or those that match one of `globs` (against the name, or the path below the folder); hidden files
    and links to folders are left out. A pipe is read where it is named itself. Raises ValueError for a path that does
    not exist, for a folder without such a file, for devices, and for archives and compressions that cannot be read.
    """
    found = [_find(name, globs) for name in inputs]
    return Found([each for part in found for each in part.sources], [each for part in found for each in part.skipped])


def kind_of(path: Path) -> Kind:
    """Return how to read a file, by its suffix under that of a compression; raise ValueError where it cannot be."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = bool(suffixes) and suffixes[-1] in compressed.SUFFIXES
    *outer, suffix = ["", *(suffixes[:-1] if packed else suffixes)]
    if suffix in UNREAD:
        raise ValueError(
            f"{path} is a {suffix} file, which is not read; unpack or convert it. Read are text, {' '.join(KINDS)}, "
            f"and compressed by {' '.join(compressed.SUFFIXES)}"
        )
    if suffix not in KINDS and suffix not in TEXT_SUFFIXES and outer and outer[-1] in KINDS:
        raise ValueError(
            f"{path} is {outer[-1]} by one suffix and unknown by the next, {suffix}; rename it, or link to it, "
            f"by a name that ends in {outer[-1]}"
        )
    kind = KINDS.get(suffix, "text")
    if packed and kind == "parquet":
        raise ValueError(f"{path}: a compressed parquet file is not read; decompress it, its columns are compressed")
    return kind


def _source(path: Path, kind: Kind | None, size: int) -> Source:
    """Return the source of a file; raise ValueError for JSON under a name that makes it one document of plain text."""
    kind = kind or kind_of(path)
    if kind == "text" and path.is_file() and not any(each.lower() in TEXT_SUFFIXES for each in path.suffixes):
        start = compressed.first_bytes(path, 64).removeprefix(BYTE_ORDER_MARK).lstrip()
        if start.startswith(JSON_STARTS):
            raise ValueError(
                f"{path} holds JSON, which its name does not say, so that it would be one document; rename it, or link "
                "to it, by a name that ends in .json, or in .txt for one document"
            )
    return Source(path, kind, size)


def _find(name: str, globs: Sequence[str]) -> Found:
    path = Path(name)
    if name == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        return _regular((file, "python") for file in _walk(root, ("*.py",), STDLIB_LEFT_OUT))
    if path.is_dir():
        patterns = globs or _default_globs()
        found = _regular((file, None) for file in _walk(path, patterns))
        if not found.sources:
            raise ValueError(f"no file below {path} matches {' '.join(patterns)}; choose others with --glob")
        return found
    if path.exists():
        return Found([_named(path)], [])
    if glob.has_magic(name):
        return _matching_pattern(name)
    raise ValueError(f"input {name!r} does not exist{suggest(name, [STDLIB])}")


def _matching_pattern(pattern: str) -> Found:
    found = _regular((Path(each), None) for each in sorted(glob.glob(pattern, recursive=True)))
    if not found.sources:
        raise ValueError(f"no file matches {pattern!r}")
    return found


def _named(path: Path) -> Source:
    status = path.stat()
    # endless, or of no use: a pipe and the terminal end, and a user who names them means it
    if stat.S_ISBLK(status.st_mode) or stat.S_ISSOCK(status.st_mode) or _is_device(path, status.st_mode):
        raise ValueError(f"input {str(path)!r} is a device or a socket; name files, folders or pipes")
    return _source(path, None, status.st_size)


def _is_device(path: Path, mode: int) -> bool:
    return stat.S_ISCHR(mode) and path.resolve().parts[:3] != ("/", "dev", "pts")


def _regular(files: Iterable[tuple[Path, Kind | None]]) -> Found:
    found = Found([], [])
    for path, kind in files:
        if path.is_file():
            found.sources.append(_source(path, kind, path.stat().st_size))
        else:
            found.skipped.append(path)
    return found


def _default_globs() -> tuple[str, ...]:
    plain = [f"*{suffix}" for suffix in (*TEXT_SUFFIXES, *KINDS) if suffix != ".parquet"]
    return (*plain, *(name + suffix for name in plain for suffix in compressed.SUFFIXES), "*.parquet")


def _walk(root: Path, globs: Sequence[str], left_out: Iterable[str] = ()) -> list[Path]:
    found = []
    for folder, subfolders, files in os.walk(root, onerror=_refuse_unreadable):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in left_out]
        found += [Path(folder, name) for name in _matching(Path(folder).relative_to(root), files, globs)]
    return sorted(found, key=lambda path: path.relative_to(root).parts)


def _refuse_unreadable(error: OSError) -> None:
    raise ValueError(f"cannot read folder {error.filename}: {error.strerror}")


def _matching(folder: Path, names: Iterable[str], globs: Sequence[str]) -> Iterator[str]:
    for name in names:
        below = (folder / name).as_posix()
        if not name.startswith(".") and any(fnmatch(name, glob) or fnmatch(below, glob) for glob in globs):
            yield name
