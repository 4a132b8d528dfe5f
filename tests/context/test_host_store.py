"""What is put into host memory comes back as it was, a chunk at a time, and does not count as the computation's."""

import inspect
from types import SimpleNamespace

import pytest
import torch

from megatron_cp.context.host_store import HostStore, HostTransfers, host_empty, visits
from megatron_cp.context.trace.live import LiveBytes

CPU = torch.device("cpu")


def filled(x, stretches):
    store = HostStore.like(x, len(x), HostTransfers(CPU))
    for stretch in stretches:
        store.put(x[stretch], [(stretch, slice(0, stretch.stop - stretch.start))])
    return store


@pytest.mark.parametrize("is_cuda", [True, False])
def test_memory_is_pinned_for_the_tensors_of_a_gpu(monkeypatch, is_cuda):
    asked = {}
    monkeypatch.setattr(torch, "empty", lambda shape, **how: asked.update(how, shape=shape))
    like = SimpleNamespace(is_cuda=is_cuda, shape=(8, 2, 3), dtype=torch.bfloat16, device=CPU)
    # without the check of argument types, to which `like` is no tensor
    inspect.unwrap(host_empty._init_fn)(like, 5)
    assert asked == {"shape": (5, 2, 3), "dtype": torch.bfloat16, "device": CPU, "pin_memory": is_cuda}


def test_tokens_come_back_in_the_order_in_which_they_are_asked_for():
    x = torch.randn(12, 2, 3)
    store = filled(x, [slice(0, 4), slice(4, 12)])
    assert torch.equal(store.get((slice(8, 12), slice(1, 5))).wait(), torch.cat([x[8:12], x[1:5]]))


def test_one_put_scatters_and_a_later_one_replaces():
    x = torch.arange(6.0)[:, None]
    store = HostStore.like(x, 8, HostTransfers(CPU))
    store.put(x, [(slice(6, 8), slice(0, 2)), (slice(0, 4), slice(2, 6))])
    assert store.get((slice(0, 4), slice(6, 8))).wait().flatten().tolist() == [2, 3, 4, 5, 0, 1]
    store.put(-x[:2], [(slice(6, 8), slice(0, 2))])
    assert store.get((slice(6, 8),)).wait().flatten().tolist() == [0, -1]


def test_what_comes_back_is_a_copy():
    x = torch.zeros(4, 1)
    store = filled(x, [slice(0, 4)])
    store.get((slice(0, 4),)).wait().fill_(1)
    assert not store.get((slice(0, 4),)).wait().any()


def test_another_store_goes_on_with_the_memory():
    x = torch.randn(4, 1)
    again = HostStore(filled(x, [slice(0, 4)]).memory, HostTransfers(CPU))
    assert torch.equal(again.get((slice(0, 4),)).wait(), x)
    assert not again.has((slice(0, 4),))


def test_live_bytes_leave_the_store_out_and_count_what_comes_back():
    x = torch.randn(1024, 1)
    with LiveBytes(x) as live:
        store = filled(x, [slice(0, 512), slice(512, 1024)])
        assert live.now == 0
        arrived = store.get((slice(0, 512),)).wait()
    assert live.now == live.peak == arrived.numel() * 4


def test_visits_hold_two_chunks_and_bring_partial_stores_where_they_have_something():
    x, stretches = torch.randn(1024, 1), [slice(start, start + 128) for start in range(0, 1024, 128)]
    brought = []
    with LiveBytes(x) as live:
        store, partial = filled(x, stretches), filled(x, stretches[2:4])
        for stretch, here in zip(stretches, visits([(s,) for s in stretches], [store], [partial]), strict=True):
            assert all(torch.equal(tensor, x[stretch]) for tensor in here)
            brought.append(len(here))
    assert brought == [1, 1, 2, 2, 1, 1, 1, 1]
    # beside them the bits of one comparison
    assert live.peak <= 4 * 128 * 4 + 8
