"""Read compressed files as if they were plain; a stream that ends early is an error in every format."""

import bz2
import gzip
import io
import lzma
import os
import zlib
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

BLOCK_BYTES = 1 << 17
GZIP, ZSTD, BZIP2, XZ = (".gz", ".gzip"), (".zst", ".zstd"), (".bz2",), (".xz", ".lzma")
SUFFIXES = (*GZIP, *ZSTD, *BZIP2, *XZ)


def open_binary(file: IO[bytes], path: Path) -> IO[bytes]:
    """Return the plain bytes of an open file, decompressed as the suffix of `path` says."""
    suffix = path.suffix.lower()
    if suffix in GZIP:
        return gzip.open(file)  # type: ignore[return-value]
    if suffix in ZSTD:
        return io.BufferedReader(_ZstdFrames(file), BLOCK_BYTES)
    if suffix in BZIP2:
        return bz2.open(file)  # type: ignore[return-value]
    if suffix in XZ:
        return lzma.open(file)
    return file


def first_bytes(path: Path, count: int) -> bytes:
    """Return the first plain bytes of a file, none of one that cannot be read."""
    with suppress(*reading_errors()), path.open("rb") as file:
        return open_binary(file, path).read(count)
    return b""


def reading_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that reading raises, by the system or a damaged stream; gzip's and bzip2's are OSErrors."""
    return (OSError, EOFError, zlib.error, lzma.LZMAError, _zstd().ZstdError)


class _ZstdFrames(io.RawIOBase):
    """All frames of a zstd file. The package's own stream reader takes a truncated file for a complete one."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decompressor = _zstd().ZstdDecompressor()
        self._frame: Any = None
        self._pending = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            block = self._file.read(BLOCK_BYTES)
            if not block:
                if self._frame is not None:
                    raise EOFError("compressed file ended before the end of its last frame")
                return 0
            self._pending = self._decompress(block)
        count = min(len(buffer), len(self._pending))
        buffer[:count], self._pending = self._pending[:count], self._pending[count:]
        return count

    def _decompress(self, block: bytes) -> bytes:
        plain = []
        while block:
            self._frame = self._frame or self._decompressor.decompressobj()
            plain.append(self._frame.decompress(block))
            block = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        return b"".join(plain)


def _zstd() -> Any:
    import zstandard

    return zstandard


def position(file: IO[bytes]) -> int:
    """Return the number of bytes read from disk, for the progress bar; 0 for a pipe, which cannot tell."""
    with suppress(OSError):
        return os.lseek(file.fileno(), 0, os.SEEK_CUR)
    return 0
