"""Check Megatron's .bin/.idx pair and count what it holds, without reading a token."""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_cp.errors import Refused

# the format of megatron.core.datasets.indexed_dataset: magic, version, dtype code, sequences, document ends
MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}


class Statistics(NamedTuple):
    """Contents of a .bin/.idx pair: counts, the `longest` document in tokens, and the size of the .bin file."""

    prefix: str
    documents: int
    sequences: int
    tokens: int
    dtype: str
    bin_bytes: int
    longest: int


def check_prefix(prefix: str) -> Statistics:
    """Count what the pair `prefix`.bin and `prefix`.idx holds.

    Raises ValueError, in one line, when a file is missing, is not in the format, or the two do not fit together.
    """
    index_path, bin_path = _paths(prefix)
    with index_path.open("rb") as file:
        dtype, sequences, ends = _header(file.read(HEADER.size), index_path)
    index_size, bin_bytes = index_path.stat().st_size, bin_path.stat().st_size
    expected = HEADER.size + 12 * sequences + 8 * ends
    # one more byte per sequence in a multimodal corpus
    if index_size not in (expected, expected + sequences):
        state = "truncated" if index_size < expected else "damaged"
        raise Refused(f"{index_path} is {state}: {index_size} bytes instead of {expected}; build the corpus again")
    raw: NDArray[np.uint8] = np.memmap(index_path, mode="r")
    lengths, pointers, documents = _sections(raw[HEADER.size :], sequences, ends)
    tokens = int(lengths.sum(dtype=np.int64))
    _check_sections(lengths, pointers, documents, np.dtype(dtype).itemsize, index_path)
    if bin_bytes != (expected := tokens * np.dtype(dtype).itemsize):
        state = "truncated" if bin_bytes < expected else "longer than its index says"
        raise Refused(f"{bin_path} is {state}: {bin_bytes} bytes instead of {expected}; build the corpus again")
    if not tokens:
        raise Refused(f"{prefix}.bin and .idx hold no tokens; build the corpus again")
    return Statistics(prefix, ends - 1, sequences, tokens, dtype, bin_bytes, int(lengths.max()))


def check_data_path(data_path: Sequence[str]) -> list[Statistics]:
    """Call check_prefix for each local prefix of Megatron's --data-path, with or without weights."""
    return [check_prefix(prefix) for prefix in _prefixes(data_path) if "://" not in prefix]


def _prefixes(data_path: Sequence[str]) -> list[str]:
    """Return the prefixes as Megatron reads them: a number before each is its weight."""
    given = [text.strip() for text in data_path]
    weighted = [_is_number(text) for text in given[::2]]
    if len(given) % 2 or not any(weighted):
        return given
    if not all(weighted):
        raise Refused(f"--data-path {' '.join(given)} has weights before some prefixes; give all of them one, or none")
    return given[1::2]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def first_document(prefix: str, statistics: Statistics, limit: int) -> NDArray[Any]:
    """Return at most `limit` ids of the first document."""
    with open(f"{prefix}.idx", "rb") as file:
        file.seek(HEADER.size)
        length = int(np.frombuffer(file.read(4), np.int32)[0])
    return np.fromfile(f"{prefix}.bin", statistics.dtype, count=min(length, limit))


def document_lengths(prefix: str, statistics: Statistics) -> list[int]:
    """Return the tokens of each document."""
    with open(f"{prefix}.idx", "rb") as file:
        raw = np.frombuffer(file.read(), np.uint8)
    lengths, _, begins = _sections(raw[HEADER.size :], statistics.sequences, statistics.documents + 1)
    ends = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))[begins]
    return [int(length) for length in np.diff(ends)]


def _paths(prefix: str) -> tuple[Path, Path]:
    paths = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    missing = [path for path in paths if not path.is_file()]
    if len(missing) == 2 and prefix.endswith((".bin", ".idx")):
        raise Refused(f"data prefix {prefix!r} shall be given without {prefix[-4:]}: {prefix[:-4]!r}")
    if missing:
        beside = "" if len(missing) == 2 else f" although {next(path for path in paths if path.is_file())} exists"
        raise Refused(
            f"data prefix {prefix!r}: {' and '.join(map(str, missing))} not found{beside}; "
            "build it with `megatron-cp data build`"
        )
    return paths


def _header(raw: bytes, path: Path) -> tuple[str, int, int]:
    """Return the dtype and the numbers of sequences and of document ends."""
    if len(raw) < HEADER.size:
        raise Refused(f"{path} is truncated: {len(raw)} bytes, less than its header; build the corpus again")
    magic, version, code, sequences, ends = HEADER.unpack(raw)
    if magic != MAGIC or version != 1 or code not in DTYPES:
        raise Refused(f"{path} is not an index of Megatron's IndexedDataset, version 1")
    return DTYPES[code], sequences, ends


def _sections(raw: NDArray[np.uint8], sequences: int, ends: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return each sequence's length, the byte where it begins, and the sequence with which each document begins."""
    return (
        np.frombuffer(raw, np.int32, sequences),
        np.frombuffer(raw, np.int64, sequences, offset=4 * sequences),
        np.frombuffer(raw, np.int64, ends, offset=12 * sequences),
    )


def _check_sections(
    lengths: NDArray[Any], pointers: NDArray[Any], documents: NDArray[Any], itemsize: int, path: Path
) -> None:
    begins = np.concatenate(([0], np.cumsum(lengths[:-1], dtype=np.int64))) * itemsize
    whole = len(documents) and documents[0] == 0 and documents[-1] == len(lengths) and (np.diff(documents) >= 0).all()
    if not whole or (lengths < 0).any() or not np.array_equal(pointers, begins[: len(lengths)]):
        raise Refused(f"{path} is damaged: its lengths, offsets and documents contradict each other")
