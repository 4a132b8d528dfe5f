"""Fabrics refuse what a process group of GPUs would corrupt or wait for without end."""

import pytest
import torch

from megatron_cp.comm import MessageError, SingleFabric, in_process
from megatron_cp.comm.fabric import Members
from megatron_cp.context.algorithms import ring
from megatron_cp.context.trace.events import Pass, Problem, UnmatchedError, match
from megatron_cp.context.trace.proof import prove
from megatron_cp.context.trace.record import Recorder, RecordingFabric, record

FAULTS = {
    "dtype": lambda buffer: buffer.new_empty(buffer.shape, dtype=torch.bfloat16),
    "shape": lambda buffer: buffer.new_empty(buffer.flatten().shape),
    "stride": lambda buffer: buffer.new_empty((*buffer.shape, 2))[..., 0],
}


def faulty(fault, side):
    """The visits of a ring whose sends or receives are of another dtype, shape or stride."""
    original = ring.circulating

    class Faulty:
        def __init__(self, fabric):
            self._fabric, self.rank, self.size = fabric, fabric.rank, fabric.size

        def exchange(self, sends, recvs):
            batches = {"sends": sends, "recvs": recvs}
            batches[side] = [(FAULTS[fault](tensor), peer) for tensor, peer in batches[side]]
            return self._fabric.exchange(**batches)

    return lambda block, way, fabric: original(block, way, Faulty(fabric))


def exchange(fabric, sent, buffer):
    peer = 1 - fabric.rank
    fabric.exchange([(sent, peer)], [(buffer, peer)]).wait()
    return buffer


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("side", ["sent", "buffer"])
def test_threads_refuse_a_message_that_does_not_fit_its_buffer(fault, side):
    tensors = {"sent": torch.ones(4, 2), "buffer": torch.zeros(4, 2)}
    assert all(
        x.eq(1).all() for x in in_process(2, lambda fabric: exchange(fabric, torch.ones(4, 2), torch.zeros(4, 2)))
    )
    tensors[side] = FAULTS[fault](tensors[side])
    with pytest.raises(MessageError, match=r"its buffer is|must be contiguous"):
        in_process(2, lambda fabric: exchange(fabric, **tensors))


def test_one_narrow_token_does_not_fill_four_wide_ones():
    with pytest.raises(MessageError, match=r"receives bfloat16 \[1, 2\] on cpu .* buffer is float32 \[4, 2\] on cpu"):
        in_process(2, lambda fabric: exchange(fabric, torch.full((1, 2), 1.5, dtype=torch.bfloat16), torch.zeros(4, 2)))


def test_threads_refuse_a_message_from_another_kind_of_device():
    with pytest.raises(MessageError, match=r"float32 \[4, 2\] on meta"):
        in_process(2, lambda fabric: exchange(fabric, torch.empty(4, 2, device="meta"), torch.zeros(4, 2)))


@pytest.mark.parametrize(("peer", "rows"), [(0, 1), (2, 1), (-1, 1), (1, 0)])
def test_threads_refuse_a_message_to_oneself_to_a_stranger_and_of_nothing(peer, rows):
    def body(fabric):
        if fabric.rank == 0:
            fabric.exchange([(torch.ones(rows, 2), peer)], [])

    with pytest.raises(MessageError, match=r"another of 2 ranks|empty messages are left out"):
        in_process(2, body)


def test_threads_refuse_a_message_that_is_never_received():
    with pytest.raises(MessageError, match="rank 0 sent a message to rank 1, which never received it"):
        in_process(2, lambda fabric: fabric.exchange([(torch.ones(1), 1)] if fabric.rank == 0 else [], []))


@pytest.mark.parametrize("other", [torch.ones(3, 2), torch.ones(2, 2, dtype=torch.bfloat16), torch.ones(4)])
@pytest.mark.parametrize("collective", ["all_gather", "reduce_scatter", "all_to_all"])
def test_threads_refuse_a_collective_of_different_tensors(collective, other):
    def body(fabric):
        x = other if fabric.rank else torch.ones(2, 2)
        return fabric.all_to_all(x, [1, 1], [1, 1]) if collective == "all_to_all" else getattr(fabric, collective)(x)

    with pytest.raises(MessageError):
        in_process(2, body)


@pytest.mark.parametrize("fabric", [SingleFabric(), Members(SingleFabric(), [0])], ids=["single", "members"])
def test_a_single_rank_has_no_peer(fabric):
    with pytest.raises(AssertionError, match="no peer"):
        fabric.exchange([(torch.ones(1), 0)], [])


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("side", ["sends", "recvs"])
def test_a_recording_refuses_a_message_that_does_not_fit_its_buffer(monkeypatch, fault, side):
    problem = Problem("zigzag", 2, 24, 2, 2, dtype="float32")
    record(problem)
    monkeypatch.setattr(ring, "circulating", faulty(fault, side))
    with pytest.raises((MessageError, UnmatchedError), match=r"the receiver expects|contiguous"):
        record(problem)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("side", ["sends", "recvs"])
def test_a_proof_refuses_a_message_that_does_not_fit_its_buffer(monkeypatch, fault, side):
    problem = Problem("zigzag", 2, 24, 2, 2, dtype="float32")
    assert prove(problem).covered
    monkeypatch.setattr(ring, "circulating", faulty(fault, side))
    proof = prove(problem)
    assert not proof.covered
    assert "its buffer is" in proof.problem or "must be contiguous" in proof.problem


def recorded(size, body):
    """What every rank's recording notes of `body`."""
    passes = []
    for rank in range(size):
        with Recorder() as recorder:
            body(RecordingFabric(recorder, tuple(range(size)), rank))
            passes.append(recorder.take())
    return Pass(tuple(passes), 1)


def test_a_recording_refuses_a_message_in_host_memory():
    with pytest.raises(MessageError, match=r"float32 \[4, 2\] on cpu in host memory"):
        recorded(2, lambda fabric: fabric.exchange([(torch.ones(4, 2, device="cpu"), 1 - fabric.rank)], []))


@pytest.mark.parametrize("collective", ["all_gather", "reduce_scatter", "all_to_all"])
def test_a_recording_refuses_a_collective_of_different_tensors(collective):
    def body(dtype):
        def inner(fabric):
            x = torch.empty(2, 3, dtype=dtype if fabric.rank else torch.float32, device="meta")
            return (
                fabric.all_to_all(x, [1, 1], [1, 1]) if collective == "all_to_all" else getattr(fabric, collective)(x)
            )

        return inner

    match(recorded(2, body(torch.float32)))
    with pytest.raises(UnmatchedError, match=r"the receiver expects int32 rows|the receiver expects float32 rows"):
        match(recorded(2, body(torch.int32)))
