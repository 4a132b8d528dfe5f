"""Read parquet tables with pyarrow, an optional package: one row group at a time, and only the columns asked for."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROWS_AT_ONCE = 1024


class Group(NamedTuple):
    """One row group of a file: its rows, and its bytes on disk."""

    rows: int
    disk_bytes: int


def groups(path: Path) -> Iterator[Group]:
    """Yield the row groups of a file; raise RuntimeError where pyarrow is not installed."""
    with _library().ParquetFile(path, page_checksum_verification=True) as file:
        for number in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(number)
            size = sum(group.column(column).total_compressed_size for column in range(group.num_columns))
            yield Group(group.num_rows, size)


def rows(path: Path, group: int, fields: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of one row group with the columns that `fields` need, or with all where one is missing.

    Bytes become text where they are UTF-8, for many writers do not mark a column as text.
    """
    with _library().ParquetFile(path, page_checksum_verification=True) as file:
        names = file.schema_arrow.names
        wanted = [field if field in names else field.partition(".")[0] for field in fields]
        # a message about a missing column names those that are there
        columns = wanted if set(wanted) <= set(names) else names
        for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns):
            for row in batch.to_pylist():
                yield {name: _text(value) for name, value in row.items()}


def damage() -> Any:
    """Return the exception types that a damaged or unreadable file raises, a tuple."""
    try:
        from pyarrow import ArrowException
    except ImportError:
        return ()
    return (ArrowException, OSError, UnicodeDecodeError)


def _text(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _text(inner) for name, inner in value.items()}
    return value.decode() if isinstance(value, bytes) else value


def _library() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise RuntimeError(
            "parquet files are read by the package pyarrow, which is not installed; pip install 'megatron-cp[parquet]'"
        ) from error
    return pyarrow.parquet
