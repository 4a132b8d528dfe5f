"""Which files a corpus is made of, in which order."""

import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal, NamedTuple

from megatron_cp.registry import suggest

STDLIB = "python-stdlib"
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
COMPRESSED_SUFFIXES = (".gz", ".zst")

# tests of the standard library hold broken encodings on purpose; the other two are not part of the library
STDLIB_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


class Source(NamedTuple):
    """One file: `text` is one document, `jsonl` one document per line, `python` text in the encoding it declares."""

    path: Path
    kind: Literal["text", "jsonl", "python"]
    size: int


def find_sources(inputs: Sequence[str], globs: Sequence[str] = ()) -> list[Source]:
    """The files of all inputs: a file as it is, a folder with all below it, `python-stdlib` for Python's own library.

    Inputs stay in the order given; the files of a folder are sorted by path. In folders only names with the known
    suffixes are taken, or those that match one of `globs` (against the name, or the path below the folder); hidden
    files and links to folders are left out. Raises ValueError for a path that does not exist and for a folder without
    such a file.
    """
    return [source for name in inputs for source in _find(name, globs)]


def kind_of(path: Path) -> Literal["text", "jsonl"]:
    """`jsonl` or `text`, by the suffix under a possible .gz or .zst."""
    suffixes = path.suffixes[:-1] if path.suffix.lower() in COMPRESSED_SUFFIXES else path.suffixes
    return "jsonl" if suffixes and suffixes[-1].lower() in JSONL_SUFFIXES else "text"


def _find(name: str, globs: Sequence[str]) -> list[Source]:
    path = Path(name)
    if name == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        return [_source(file, "python") for file in _walk(root, ("*.py",), STDLIB_LEFT_OUT)]
    if path.is_dir():
        patterns = globs or _default_globs()
        found = [_source(file, kind_of(file)) for file in _walk(path, patterns)]
        if not found:
            raise ValueError(f"no file below {name} matches {' '.join(patterns)}; choose others with --glob")
        return found
    if not path.exists():
        raise ValueError(f"input {name!r} does not exist{suggest(name, [STDLIB])}")
    return [_source(path, kind_of(path))]


def _source(path: Path, kind: Literal["text", "jsonl", "python"]) -> Source:
    return Source(path, kind, path.stat().st_size)


def _default_globs() -> tuple[str, ...]:
    plain = [f"*{suffix}" for suffix in TEXT_SUFFIXES + JSONL_SUFFIXES]
    return (*plain, *(glob + suffix for glob in plain for suffix in COMPRESSED_SUFFIXES))


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
