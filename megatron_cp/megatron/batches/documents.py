"""Documents of a corpus: their lengths from the index, and the tokens of those that a rank runs."""

from functools import cached_property
from typing import Any

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.indexed_dataset import IndexedDataset
from numpy.typing import NDArray

from megatron_cp.corpus.index import check_prefix, document_lengths


class CorpusDocuments:
    """Documents of a .bin/.idx pair, of which a run predicts each token but the first; longer ones are cut.

    lengths: predictions of each document, by its number in the corpus; 0 for one that has none
    cut:     number of documents that are longer than `longest` predictions
    """

    def __init__(self, prefix: str, longest: int, mmap: bool = True) -> None:
        self._longest = longest
        whole = np.array(document_lengths(prefix, check_prefix(prefix))) - 1
        self.lengths: NDArray[np.int64] = whole.clip(0, longest)
        self.cut = int((whole > longest).sum())
        self._prefix, self._mmap = prefix, mmap

    @cached_property
    def _data(self) -> IndexedDataset:
        return IndexedDataset(self._prefix, mmap=self._mmap)

    def tokens(self, document: int) -> NDArray[np.int64]:
        """Return the tokens of a document, one more than its length."""
        begin, end = self._data.document_indices[document : document + 2]
        parts: list[Any] = [self._data[at] for at in range(begin, end)]
        return np.concatenate(parts)[: self._longest + 1].astype(np.int64)

    def numbers(self, split: str, part: int) -> NDArray[np.int64]:
        """Return the documents with predictions of a part of `--split`: 0 for training, 1, 2 for the two others."""
        between = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))[part]
        if between is None:
            return np.empty(0, np.int64)
        first, last = (round(share * len(self.lengths)) for share in between)
        return first + self.lengths[first:last].nonzero()[0]
