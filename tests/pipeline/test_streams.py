"""Activations leave for pinned host memory and come back on streams of their own, ordered with the computation."""

import pytest
import torch

from megatron_cp.pipeline.saved import HostMover
from tests.context.test_streams import RaceDetector, Stream

CPU = torch.device("cpu")
EMPTY = torch.empty


@pytest.fixture
def detector(monkeypatch):
    """A race detector for movers on two streams, with what they asked of torch.empty for the host's memory."""
    found = RaceDetector()
    found.pinned = []

    def empty(*sizes, pin_memory=None, **how):
        if pin_memory is not None:
            found.pinned.append(pin_memory)
        return EMPTY(*sizes, **how)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: found.current)
    monkeypatch.setattr(torch.cuda, "stream", found.on)
    return found


def two_steps(detector):
    """Two chunks leave, come back and are used, twice, so that the second step writes buffers of the first."""
    mover = HostMover(CPU)
    mover._streams = [Stream(), Stream()]
    with detector:
        for _ in range(2):
            chunks = [torch.randn(64) for _ in range(2)]
            expected = [chunk.clone() for chunk in chunks]
            for number, chunk in enumerate(chunks):
                mover.evict((0, number), [chunk.untyped_storage()])
            mover.settle()
            for number in range(2):
                mover.load((0, number))
            for number, chunk in enumerate(chunks):
                mover.arrived((0, number))
                chunk.mul_(2)
            assert all(torch.equal(chunk, 2 * before) for chunk, before in zip(chunks, expected, strict=True))
    mover.finish()


def test_no_move_races_with_the_computation(detector):
    two_steps(detector)
    assert detector.copies >= 8
    assert not detector.found


def test_buffers_on_the_host_are_pinned(detector):
    two_steps(detector)
    # those of the second step are the first one's
    assert detector.pinned == [True, True]


def test_without_a_gpu_nothing_is_pinned(detector):
    HostMover(CPU).evict((0, 0), [torch.zeros(4).untyped_storage()])
    assert detector.pinned == [False]


def forget_the_computation(monkeypatch):
    monkeypatch.setattr(Stream, "wait_stream", lambda stream, other: None)


def forget_the_copies(monkeypatch):
    monkeypatch.setattr(Stream, "wait_event", lambda stream, event: None)


def forget_to_settle(monkeypatch):
    def settle(mover):
        for storages, _ in mover._leaving:
            for storage in storages:
                storage.resize_(0)
        mover._leaving.clear()

    monkeypatch.setattr(HostMover, "settle", settle)


def forget_the_wait(monkeypatch):
    original = HostMover.load

    def load(mover, chunk):
        original(mover, chunk)
        mover._coming[chunk] = mover._coming[chunk]._replace(done=None)

    monkeypatch.setattr(HostMover, "load", load)


@pytest.mark.parametrize("fault", [forget_the_computation, forget_the_copies, forget_to_settle, forget_the_wait])
def test_an_order_that_is_missing_is_found(detector, monkeypatch, fault):
    fault(monkeypatch)
    two_steps(detector)
    assert detector.found
