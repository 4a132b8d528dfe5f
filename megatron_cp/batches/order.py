"""The order in which a run reads documents, and the documents of each of its steps.

Both follow from lengths, a seed and the number of documents read so far, so that every rank works them out by itself
and a run may go on with another number of ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count

import numpy as np
from numpy.typing import NDArray

from megatron_cp.batches.wlb import Lengths, OutlierQueues
from megatron_cp.errors import Refused

EPOCHS = 4
"""Epochs whose orders are kept: training's, and that of a validation set beside it."""


@dataclass(frozen=True, eq=False)
class DocumentOrder:
    """Numbers of documents, in another random order in each epoch."""

    documents: NDArray[np.int64]
    seed: int

    def __post_init__(self) -> None:
        if not len(self.documents):
            raise Refused("a run needs documents of at least 2 tokens, got none; give another corpus or --split")

    def read(self, start: int, number: int) -> list[int]:
        """Return the documents read at places start, start + 1, … of the run."""
        size = len(self.documents)
        found = []
        for place in range(start, start + number):
            epoch, at = divmod(place, size)
            found.append(int(self.documents[_shuffled(size, self.seed, epoch)[at]]))
        return found


@lru_cache(EPOCHS)
def _shuffled(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(size)


def steps(
    order: DocumentOrder, lengths: Lengths, start: int, batch: int, holds: int | None = None
) -> Iterator[list[int]]:
    """Yield the documents of each step from the one that begins at place `start`; each step reads `batch` of them.

    lengths: of all documents, by their numbers
    holds:   tokens of a microbatch, for an algorithm that keeps long documents for later steps: the steps before
             `start` are gone through, so that the documents that wait are those of a run without a break
    """
    if holds is None:
        for place in count(start, batch):
            yield order.read(place, batch)
    else:
        queues = OutlierQueues(holds)
        for place in count(start % batch, batch):
            documents = queues.step(order.read(place, batch), lengths)
            if place >= start:
                yield documents
