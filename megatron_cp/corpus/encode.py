"""Encode documents as token ids in worker processes; the order is that of the input for any number of them."""

import functools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_cp.corpus.documents import Bad, Piece, read
from megatron_cp.corpus.tokenizers import BYTE, Tokenizer, load_tokenizer

# Megatron's own threshold (indexed_dataset.DType.optimal_dtype): below it ids are stored in two bytes
UINT16_VOCABULARY = 65500
DTYPES = ("uint16", "int32")
# the .idx file stores the length of a document as int32
LONGEST_DOCUMENT = 2**31 - 1
PIECES_AHEAD_PER_WORKER = 3
# bytes of input below which one more process costs more time to start than it saves
WORTH_A_BYTE_WORKER, WORTH_A_WORKER = 64_000_000, 2_000_000


class EncodingPlan(NamedTuple):
    """Options of a worker, which loads the tokenizer itself, once.

    longest: tokens of a document; a longer text becomes several, of which the last has the end-of-document token
    """

    tokenizer: str
    eod_id: int | None
    append_eod: bool
    fields: tuple[str, ...]
    dtype: str
    longest: int | None = None


class Batch(NamedTuple):
    """Documents of one piece: their ids one after another, and for each its tokens and its bytes of UTF-8.

    `bad` pairs what could not be read with the number of documents before it; `empty` counts texts without tokens. Of
    the documents of one text the last has its bytes, and the others none.
    """

    tokens: NDArray[Any]
    lengths: NDArray[np.int64]
    text_bytes: NDArray[np.int64]
    bad: tuple[tuple[int, Bad], ...]
    empty: int
    disk_bytes: int

    def head(self, documents: int) -> "Batch":
        """Return the batch cut after the given number of documents."""
        tokens = self.tokens[: self.lengths[:documents].sum()]
        bad = tuple(each for each in self.bad if each[0] < documents)
        sizes = (self.lengths[:documents], self.text_bytes[:documents])
        return self._replace(tokens=tokens, lengths=sizes[0], text_bytes=sizes[1], bad=bad)


def make_plan(
    tokenizer: Tokenizer,
    eod_id: int | None,
    append_eod: bool,
    fields: Sequence[str],
    dtype: str | None,
    longest: int | None = None,
) -> EncodingPlan:
    """Make the plan for a loaded tokenizer; `dtype` None chooses as Megatron does, by the size of the vocabulary.

    Raises ValueError when documents shall end with a token that the tokenizer does not have.
    """
    if append_eod and tokenizer.eod is None:
        raise ValueError(
            f"tokenizer {tokenizer.name} names no end-of-document token; choose one with --eod-id or leave it out "
            "with --no-append-eod"
        )
    dtype = dtype or ("uint16" if tokenizer.vocabulary < UINT16_VOCABULARY else "int32")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}")
    return EncodingPlan(tokenizer.name, eod_id, append_eod, tuple(fields), dtype, longest)


def encode_piece(piece: Piece, tokenizer: Tokenizer, plan: EncodingPlan) -> Batch:
    """Encode one piece; raise ValueError for an id that the tokenizer or the dtype does not allow."""
    documents: list[NDArray[Any]] = []
    lengths: list[int] = []
    text_bytes: list[int] = []
    bad, empty = [], 0
    for text in read(piece, plan.fields):
        if isinstance(text, Bad):
            bad.append((len(lengths), text))
            continue
        ids = _ids_of(text, tokenizer, plan) if text.strip() else None
        if ids is None:
            empty += 1
        else:
            documents.append(ids)
            most = plan.longest or len(ids)
            parts = [min(most, len(ids) - begin) for begin in range(0, len(ids), most)]
            lengths += parts
            text_bytes += [*(0 for _ in parts[1:]), len(text.encode())]
    tokens = np.concatenate(documents) if documents else np.empty(0, plan.dtype)
    sizes = (np.array(lengths, np.int64), np.array(text_bytes, np.int64))
    return Batch(tokens, *sizes, tuple(bad), empty, piece.disk_bytes)


def _ids_of(text: str, tokenizer: Tokenizer, plan: EncodingPlan) -> NDArray[Any] | None:
    ids = np.asarray(tokenizer.encode(text))
    if not len(ids):
        return None
    largest = max(int(ids.max()), tokenizer.eod if plan.append_eod and tokenizer.eod is not None else 0)
    if largest > np.iinfo(plan.dtype).max:
        raise ValueError(f"token id {largest} of {tokenizer.name} does not fit --dtype {plan.dtype}; use int32")
    if largest >= tokenizer.vocabulary:
        raise ValueError(f"{tokenizer.name} produced token id {largest}, beyond its vocabulary {tokenizer.vocabulary}")
    if len(ids) + plan.append_eod > LONGEST_DOCUMENT:
        raise ValueError(f"a document of {len(ids)} tokens is longer than the format allows; split it")
    if not plan.append_eod:
        return ids.astype(plan.dtype)
    return np.append(ids.astype(plan.dtype), np.array(tokenizer.eod, plan.dtype))


def workers_for(disk_bytes: int, tokenizer: str) -> int:
    """Return the number of processes that pay off for the input, at most one per CPU that this process may use."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cpus, 1 + disk_bytes // (WORTH_A_BYTE_WORKER if tokenizer == BYTE else WORTH_A_WORKER))


def encode(pieces: Iterable[Piece], plan: EncodingPlan, workers: int) -> Generator[Batch]:
    """Yield batches in the order of the pieces; one worker is this process itself.

    Raises RuntimeError when a worker process dies. Workers end with this generator, and also when this process is
    killed.
    """
    if workers < 1:
        raise ValueError(f"--workers {workers} is less than 1")
    if workers == 1:
        tokenizer = load_tokenizer(plan.tokenizer, plan.eod_id)
        yield from (encode_piece(piece, tokenizer, plan) for piece in pieces)
        return
    with _pool(workers) as pool:
        running: deque[Future[Batch]] = deque()
        try:
            for piece in pieces:
                running.append(pool.submit(_encode_in_worker, piece, plan))
                if len(running) >= PIECES_AHEAD_PER_WORKER * workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        except BrokenProcessPool as error:
            raise RuntimeError("a worker process died, perhaps out of memory; try fewer --workers") from error


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    # spawn, not fork: the progress bar and torch have threads by now
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker)
    try:
        yield pool
    except BaseException:
        # a worker may be minutes away from the end of a large document
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()
        # one that ends while it sends a result leaves the pool's thread waiting for the rest: end the stream
        pool._result_queue._writer.close()  # type: ignore[attr-defined]
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    # Ctrl-C reaches the whole process group; the parent alone decides what it means
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


# a worker encodes with one tokenizer
_loaded = functools.lru_cache(1)(load_tokenizer)


def _encode_in_worker(piece: Piece, plan: EncodingPlan) -> Batch:
    return encode_piece(piece, _loaded(plan.tokenizer, plan.eod_id), plan)
