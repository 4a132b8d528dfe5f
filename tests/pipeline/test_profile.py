"""Costs are measured on a CPU without any of CUDA's functions."""

import pytest
import torch

from megatron_cp.pipeline.action import Action
from megatron_cp.pipeline.clock import Clock
from megatron_cp.pipeline.profile import Profile, hop_seconds
from tests.pipeline.played import scheduled


@pytest.fixture
def without_cuda(monkeypatch):
    for name in ("Event", "synchronize", "current_device", "current_stream"):
        monkeypatch.delattr(torch.cuda, name)


@pytest.fixture
def seconds(monkeypatch):
    """The host's clock, which each look moves on by one second."""
    now = iter(map(float, range(1000)))
    monkeypatch.setattr("time.perf_counter", lambda: next(now))


def test_times_are_the_hosts_on_a_cpu(without_cuda, seconds):
    clock = Clock(torch.device("cpu"))
    begun = clock.mark()
    clock.mark()
    ended = clock.mark()
    clock.settle()
    assert clock.seconds(begun, ended) == 2.0


@pytest.mark.parametrize("name", ["1f1b", "zb-h1"])
def test_a_stage_is_measured_on_a_cpu(without_cuda, seconds, name):
    profile = Profile(3, Clock(torch.device("cpu")), set, lambda stage, micro: 64)
    weight = torch.ones(4, 4, requires_grad=True)
    for _ in range(3):
        profile.begin()
        for action in scheduled(name, 2, 4).table[0]:
            for kind in "IW" if action.kind == "B" else action.kind:
                with profile.observe(Action(0, kind, action.micro)):
                    weight.square().sum()
    assert profile.done
    found = profile.of(0)
    assert (found.forward, found.input, found.weight) == (1.0, 1.0, 1.0)
    assert (found.kept, found.held) == (weight.nbytes, 64)


class Echo:
    """Channels over which everything has arrived."""

    def send(self, target, kind, tensor):
        return self

    def receive(self, source, kind, buffer):
        return self

    def wait(self): ...


def test_a_hop_is_measured_on_a_cpu(without_cuda):
    assert 0 < hop_seconds(Echo(), 0, 2, lambda: torch.empty(1)) < 1
