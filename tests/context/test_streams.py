"""Copies between device and host run on streams of their own: conflicting uses of memory are always ordered.

A race detector on a CPU: streams and events are stand-ins that know which operations come before what is launched next,
and a dispatch mode sees the memory that every operation reads and writes.
"""

from collections import defaultdict
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megatron_cp.comm import SingleFabric
from megatron_cp.context.algorithms import fpdt
from megatron_cp.context.host_store import HostRead, HostStore, HostTransfers
from megatron_cp.context.plan import plan, task_for
from tests.context.trace.in_flight import RESERVING, bytes_of


class Event(torch.cuda.Event):
    def __new__(cls, before):
        return super().__new__(cls)

    def __init__(self, before):
        self.before = set(before)


class Stream:
    """`before`: operations that are over when the next one that is launched here starts."""

    def __init__(self):
        self.before = set()

    def wait_stream(self, other):
        self.before |= other.before

    def wait_event(self, event):
        self.before |= event.before

    def record_event(self):
        return Event(self.before)


class Use(NamedTuple):
    operation: int
    name: str
    start: int
    stop: int
    writes: bool


class RaceDetector(TorchDispatchMode):
    """Notes in `found` two operations on common memory, one of which writes, that no stream or event orders."""

    def __init__(self):
        super().__init__()
        self.main = self.current = Stream()
        self.found, self.operations, self.copies = [], 0, 0
        self._uses, self._kept = defaultdict(list), []

    @contextmanager
    def on(self, stream):
        self.current, before = stream, self.current
        yield
        self.current = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if func.is_view or name in RESERVING:
            return result
        self.operations += 1
        self.copies += self.current is not self.main
        for declared, given in zip(func._schema.arguments, args, strict=False):
            writes = declared.alias_info is not None and declared.alias_info.is_write
            self._use(given, name, writes)
        self._use(result, name, True)
        self.current.before.add(self.operations)
        return result

    def _use(self, values, name, writes):
        for value in tree_iter(values):
            if isinstance(value, Tensor) and value.numel():
                # an address that is given to another tensor would mix up the two
                self._kept.append(value.untyped_storage())
                use = Use(self.operations, name, *bytes_of(value), writes)
                uses = self._uses[value.untyped_storage()._cdata]
                self.found += [f"{other.name} and {name}" for other in uses if self._conflict(other, use)]
                uses.append(use)

    def _conflict(self, other, use):
        overlap = other.start < use.stop and use.start < other.stop
        ordered = other.operation == use.operation or other.operation in self.current.before
        return overlap and (other.writes or use.writes) and not ordered


@pytest.fixture
def detector(monkeypatch):
    found = RaceDetector()

    class Transfers(HostTransfers):
        def __init__(self, device):
            self.device, self._streams = device, [Stream(), Stream()]

    monkeypatch.setattr(fpdt, "HostTransfers", Transfers)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: found.current)
    monkeypatch.setattr(torch.cuda, "stream", found.on)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
    return found


def both_passes(detector, backend, chunks):
    q, k, v, dout = (torch.randn(48, 1, heads, 4) for heads in (4, 2, 2, 4))
    made = plan(backend, cp=SingleFabric(), kernel="reference", chunks=chunks)
    task = task_for(q, k, v, made)
    with detector:
        out, saved = made.loop.forward(q, k, v, task)
        return [out, *made.loop.backward(dout, saved, task)]


@pytest.mark.parametrize("chunks", [2, 4])
@pytest.mark.parametrize("backend", ["fpdt", "zigzag"])
def test_no_copy_races_with_the_computation(detector, backend, chunks):
    both_passes(detector, backend, chunks)
    assert detector.copies > 10 * chunks
    assert not detector.found


def forget_the_wait(monkeypatch):
    monkeypatch.setattr(HostRead, "wait", lambda read: read.tensor)


def forget_the_writes(monkeypatch):
    monkeypatch.setattr(
        HostStore, "get", lambda store, tokens: store._transfers.up([store.memory[wanted] for wanted in tokens], [])
    )


def forget_the_computation(monkeypatch):
    monkeypatch.setattr(Stream, "wait_stream", lambda stream, other: None)


def forget_to_settle(monkeypatch):
    monkeypatch.setattr(HostTransfers, "settle", lambda transfers: None)


@pytest.mark.parametrize("fault", [forget_the_wait, forget_the_writes, forget_the_computation, forget_to_settle])
def test_an_order_that_is_missing_is_found(detector, monkeypatch, fault):
    fault(monkeypatch)
    both_passes(detector, "fpdt", 4)
    assert detector.found
