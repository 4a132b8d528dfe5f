"""Write corpora in Megatron's IndexedDataset format with megatron.core's own builder, completely or not at all."""

import fcntl
import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_cp.corpus.documents import Bad
from megatron_cp.corpus.encode import Batch
from megatron_cp.corpus.index import Statistics, check_data_path, check_prefix
from megatron_cp.errors import CannotRun, Refused, as_refusals
from megatron_cp.megatron.hooks import dataset_helpers_need_no_make

__all__ = ["Limits", "Written", "check_data_path", "check_output", "check_prefix", "check_split", "write"]

# Megatron's own, where neither --split nor paths for each dataset are given
DEFAULT_SPLIT = "969,30,1"
DATASETS = ("training", "validation", "test")


class Limits(NamedTuple):
    """Limits of a corpus: stop at the document that reaches `text_bytes`, or after `documents`."""

    text_bytes: int | None = None
    documents: int | None = None


@dataclass(frozen=True, kw_only=True)
class Written:
    """Counts of a written corpus, with the empty texts and the bad files or lines that were left out.

    `cut` counts the texts that became several documents.

    `seconds` is the time from opening the first input to the last document, without the import of megatron.core.
    """

    documents: int
    tokens: int
    text_bytes: int
    empty: int
    bad: tuple[Bad, ...]
    stopped: bool
    seconds: float
    cut: int


def check_split(
    found: Sequence[Statistics], split: str | None, evaluates: bool = False, only_train: bool = False
) -> None:
    """Raise ValueError where --split leaves a dataset without a document of a corpus, or a run without validation data.

    Megatron repeats a dataset's documents until it has the samples that a run needs, which never ends for none.

    evaluates:  the run has --eval-iters, which fail without a validation dataset
    only_train: the documents of the other datasets are not repeated (--full-validation)
    """
    with _quiet_import():
        from megatron.core.datasets.blended_megatron_dataset_config import (
            convert_split_vector_to_split_matrix,
            parse_and_normalize_split,
        )

    shares = (split or DEFAULT_SPLIT).replace(" ", "")
    with as_refusals():
        matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(shares))
    if evaluates and matrix[1] is None:
        raise Refused(f"--split {shares} has no validation data, which --eval-iters reads; add --eval-iters 0")
    for name, between in list(zip(DATASETS, matrix, strict=True))[: 1 if only_train else None]:
        for one in found:
            if between and round(between[0] * one.sequences) == round(between[1] * one.sequences):
                raise Refused(
                    f"--split {shares} leaves the {name} dataset none of the {one.sequences} documents "
                    f"of {one.prefix}: give --split 100,0,0 --eval-iters 0, or build a corpus of more documents "
                    "(a text file is one, which data build --split-documents 1024 cuts)"
                )


def check_output(prefix: str, overwrite: bool) -> None:
    """Check that a corpus can be written to `prefix`; raises ValueError before any work is done."""
    path = Path(prefix)
    if prefix.endswith((".bin", ".idx", "/")) or path.name in ("", ".."):
        raise Refused(f"--output {prefix!r} must be a prefix, such as data/corpus for data/corpus.bin and .idx")
    there = [str(each) for each in _pair(path) if each.exists()]
    if there and not overwrite:
        raise Refused(f"{' and '.join(there)} already exist; replace with --overwrite or choose another --output")
    try:
        with _building(path):
            pass
    except OSError as error:
        raise Refused(f"cannot write to output folder {path.parent}: {error.strerror}") from None


def write(
    prefix: str,
    batches: Iterable[Batch],
    dtype: str,
    *,
    limits: Limits = Limits(),  # noqa: B008
    skip_bad: bool = False,
    overwrite: bool = False,
    progress: Callable[[Batch], None] = lambda batch: None,
) -> Written:
    """Write the documents of all batches to `prefix`.bin and `prefix`.idx.

    Both files appear under their names only when complete; on any error, and on Ctrl-C, nothing is left. `overwrite`
    also removes the sample indices that Megatron keeps under `prefix`/cache: it finds them by the name of the corpus
    and would use them for the new one. Raises ValueError for the first bad document unless `skip_bad`, and when no
    document is left; RuntimeError with the path when the disk takes no more.
    """
    check_output(prefix, overwrite)
    target = Path(prefix)
    with _building(target) as folder:
        partial = folder / "corpus"
        builder = _builder(_pair(partial)[0], dtype)
        try:
            written = _add(builder, _stop_at(batches, limits), skip_bad, progress)
            if not written.documents:
                raise Refused(_nothing(written))
            builder.finalize(str(_pair(partial)[1]))
            builder.data_file.close()
        except OSError as error:
            # inputs are named by their own errors
            if error.filename is not None:
                raise
            raise CannotRun(
                f"cannot write {target}.bin: {error.strerror}; free some space, or change --output"
            ) from error
        finally:
            with suppress(OSError):
                builder.data_file.close()
        check_prefix(str(partial))
        _publish(partial, target)
    return written


def _builder(path: Path, dtype: str) -> Any:
    with _quiet_import():
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    return IndexedDatasetBuilder(str(path), dtype=np.dtype(dtype).type)


@contextmanager
def _quiet_import() -> Iterator[None]:
    # megatron.core warns of absent packages that no corpus needs, and torch of an absent GPU
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _stop_at(batches: Iterable[Batch], limits: Limits) -> Iterator[tuple[Batch, bool]]:
    """Yield the batches up to the document that reaches a limit, each with True if it is the last for that reason."""
    text_bytes = documents = 0
    for batch in batches:
        room = len(batch.lengths) + 1
        if limits.text_bytes is not None:
            before = text_bytes + np.cumsum(batch.text_bytes)
            room = min(room, int(np.searchsorted(before, limits.text_bytes)) + 1)
        if limits.documents is not None:
            room = min(room, limits.documents - documents)
        if room <= len(batch.lengths):
            yield batch.head(room), True
            return
        text_bytes += int(batch.text_bytes.sum())
        documents += len(batch.lengths)
        yield batch, False


def _add(
    builder: Any, batches: Iterable[tuple[Batch, bool]], skip_bad: bool, progress: Callable[[Batch], None]
) -> Written:
    documents = tokens = text_bytes = empty = cut = 0
    bad: list[Bad] = []
    stopped = False
    started = time.perf_counter()
    for batch, last in batches:
        found = [each for _, each in batch.bad]
        if found and not skip_bad:
            raise Refused(f"{found[0]}; leave such documents out with --skip-bad")
        end = 0
        for length in batch.lengths.tolist():
            builder.add_document(batch.tokens[end : end + length], [length])
            end += length
        documents, tokens = documents + len(batch.lengths), tokens + end
        text_bytes, empty = text_bytes + int(batch.text_bytes.sum()), empty + batch.empty
        # a text of several documents has its bytes at the last one
        inner = batch.text_bytes == 0
        cut += int(np.sum(inner & ~np.append(inner[1:], False)))
        bad += found
        stopped = last
        progress(batch)
    seconds = time.perf_counter() - started
    return Written(
        documents=documents,
        tokens=tokens,
        text_bytes=text_bytes,
        empty=empty,
        bad=tuple(bad),
        stopped=stopped,
        seconds=seconds,
        cut=cut,
    )


def _nothing(written: Written) -> str:
    left_out = [f"{written.empty} empty"] if written.empty else []
    left_out += [f"{len(written.bad)} bad, the first {written.bad[0]}"] if written.bad else []
    return f"the corpus has no text: {', '.join(left_out) or 'the input holds no document'}"


def _pair(prefix: Path) -> tuple[Path, Path]:
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


@contextmanager
def _building(target: Path) -> Iterator[Path]:
    """Make a folder beside the target for one build at a time; files that a killed build left there are removed.

    The lock on the folder goes with the process that holds it.
    """
    new_folders = [each for each in (target.parent, *target.parent.parents) if not each.exists()]
    folder = target.parent / f".{target.name}.building"
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(f"another process is building {target} now") from None
        for path in _pair(folder / "corpus"):
            path.unlink(missing_ok=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)
        # folders that are still empty because nothing was built
        for each in new_folders:
            with suppress(OSError):
                each.rmdir()


def _publish(partial: Path, target: Path) -> None:
    # the old index goes first and the new one comes last: never an index beside the wrong .bin
    (new_bin, new_index), (bin_path, index_path) = _pair(partial), _pair(target)
    with suppress(FileNotFoundError):
        index_path.unlink()
    for indices in target.glob("cache/*_indices"):
        shutil.rmtree(indices)
    new_bin.replace(bin_path)
    new_index.replace(index_path)


def compile_helpers(old: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Run make for Megatron's dataset helpers, but not where they are installed without a Makefile."""
    if not dataset_helpers_need_no_make():
        old(*args, **kwargs)
