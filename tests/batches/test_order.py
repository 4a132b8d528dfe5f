"""The order of documents: every epoch holds each once, and a run that goes on reads what an unbroken one does."""

from itertools import islice

import numpy as np
import pytest

from megatron_cp.batches.order import DocumentOrder, steps
from megatron_cp.errors import Refused

LENGTHS = [3, 40, 7, 25, 1, 12, 33, 2, 19, 5, 28]
ORDER = DocumentOrder(np.arange(1, 10), seed=3)


def test_every_epoch_holds_each_document_once_in_another_order() -> None:
    epochs = [ORDER.read(9 * epoch, 9) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(1, 10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_reading_in_parts_is_reading_at_once() -> None:
    assert [*ORDER.read(0, 5), *ORDER.read(5, 17)] == ORDER.read(0, 22)


def test_another_seed_is_another_order() -> None:
    assert DocumentOrder(np.arange(1, 10), seed=4).read(0, 9) != ORDER.read(0, 9)


def test_no_documents_are_refused() -> None:
    with pytest.raises(Refused, match="needs documents of at least 2 tokens, got none"):
        DocumentOrder(np.empty(0, np.int64), seed=3)


@pytest.mark.parametrize("holds", [None, 40])
@pytest.mark.parametrize("done", [1, 2, 5])
def test_a_run_that_goes_on_has_the_steps_of_an_unbroken_one(holds: int | None, done: int) -> None:
    unbroken = list(islice(steps(ORDER, LENGTHS, 0, 4, holds), 8))
    assert list(islice(steps(ORDER, LENGTHS, 4 * done, 4, holds), 8 - done)) == unbroken[done:]
    assert all(unbroken)


def test_documents_that_wait_are_neither_lost_nor_repeated() -> None:
    found = list(islice(steps(ORDER, LENGTHS, 0, 4, 40), 90))
    assert any(len(step) != 4 for step in found)
    run = [at for step in found for at in step]
    read = ORDER.read(0, 4 * 90)
    # what still waits are long documents that were read and have not been run
    waiting = [*read]
    for at in run:
        waiting.remove(at)
    assert len(waiting) < 12
    assert all(LENGTHS[at] >= 10 for at in waiting)
