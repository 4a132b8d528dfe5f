"""Reading .gz and .zst as if they were plain files; a stream that ends early is an error in both."""

import gzip
import io
import os
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

BLOCK_BYTES = 1 << 17


def open_binary(file: IO[bytes], path: Path) -> IO[bytes]:
    """The plain bytes of an opened file, decompressed when the suffix of `path` says so."""
    match path.suffix.lower():
        case ".gz":
            return gzip.open(file)  # type: ignore[return-value]
        case ".zst":
            return io.BufferedReader(_ZstdFrames(file), BLOCK_BYTES)
    return file


def decompression_errors() -> tuple[type[Exception], ...]:
    """What reading from a damaged stream raises."""
    import zlib

    return (EOFError, gzip.BadGzipFile, zlib.error, _zstd().ZstdError)


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
    """How many bytes of the file on disk have been read, for the progress bar; a pipe does not know."""
    with suppress(OSError):
        return os.lseek(file.fileno(), 0, os.SEEK_CUR)
    return 0
