"""Corpora read back with Megatron's own reader, and small ones to write."""

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_cp.corpus.encode import encode, make_plan
from megatron_cp.corpus.pieces import cut
from megatron_cp.corpus.sources import find_sources
from megatron_cp.corpus.tokenizers import load_tokenizer
from megatron_cp.megatron.dataset import Limits, Written, write


def ids_of(prefix: Path) -> list[list[int]]:
    """The ids of each document."""
    return [document.tolist() for document in arrays_of(prefix)]


def arrays_of(prefix: Path) -> list[NDArray[Any]]:
    with warnings.catch_warnings():
        # megatron.core warns of absent packages, and of having to guess its rank
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        dataset = IndexedDataset(str(prefix))
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
    return [np.array(dataset[index]) for index in range(len(dataset))]


def texts_of(prefix: Path) -> list[str]:
    """The texts of a corpus of bytes, each of which ends with the end of document."""
    documents = ids_of(prefix)
    assert all(ids[-1] == 256 for ids in documents)
    return [bytes(ids[:-1]).decode() for ids in documents]


def jsonl(path: Path, texts: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def build(
    prefix: Path,
    *inputs: Path,
    tokenizer: str = "byte",
    workers: int = 1,
    append_eod: bool = True,
    dtype: str | None = None,
    limits: Limits = Limits(),  # noqa: B008
    skip_bad: bool = False,
    overwrite: bool = False,
) -> Written:
    plan = make_plan(load_tokenizer(tokenizer), None, append_eod, ("text",), dtype)
    batches = encode(cut(find_sources([str(path) for path in inputs]).sources), plan, workers)
    return write(str(prefix), batches, plan.dtype, limits=limits, skip_bad=skip_bad, overwrite=overwrite)
