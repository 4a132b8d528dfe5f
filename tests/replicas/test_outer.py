"""At a sync all islands get the mean to the last bit, for the bytes of the formula, and DiLoCo steps as SGD does."""

import pytest
import torch

from megatron_cp.comm import in_process
from megatron_cp.replicas import outer
from megatron_cp.replicas.outer import Stepped, average, nesterov, put_mean, sampled_spread, sent

SHAPES = [(3, 5), (1,), (7,), (2, 2, 2)]
ELEMENTS = 31
MOST = outer.MOST


def drawn(rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


@pytest.mark.parametrize("islands", [1, 2, 3, 4])
@pytest.mark.parametrize("most", [1, 16, MOST])
def test_islands_have_the_mean_to_the_last_bit(islands: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outer, "MOST", most)

    def meet(fabric):
        tensors = drawn(fabric.rank)
        return tensors, put_mean(tensors, fabric), fabric.sent

    found = in_process(islands, meet)
    means = [sum(tensors) / islands for tensors in zip(*map(drawn, range(islands)), strict=True)]
    for tensors, _, _ in found:
        for tensor, mean, first in zip(tensors, means, found[0][0], strict=True):
            torch.testing.assert_close(tensor, mean, rtol=1e-12, atol=1e-12)
            assert tensor.equal(first)
    distances = [
        sum((a - b).square().sum() for a, b in zip(drawn(rank), means, strict=True)) for rank in range(islands)
    ]
    for (_, spread, _), distance in zip(found, distances, strict=True):
        torch.testing.assert_close(spread.distance, torch.as_tensor(distance, dtype=torch.float64))
        torch.testing.assert_close(spread.norm, sum(mean.square().sum() for mean in means))
    groups = {1: [15, 1, 7, 8], 16: [16, 15], MOST: [ELEMENTS]}[most]
    assert [count for *_, count in found] == [8 * sum(sent(size, islands) for size in groups)] * islands


def test_no_tensors_are_no_message() -> None:
    def meet(fabric):
        return put_mean([], fabric), fabric.sent

    assert in_process(2, meet) == [(outer.Spread(torch.zeros(()), torch.zeros(())), 0)] * 2


@pytest.mark.parametrize("every", [1, 4, 1000])
def test_a_sample_is_each_so_many_th_element_of_all(every: int) -> None:
    def compare(fabric):
        tensors = drawn(fabric.rank)
        spread = sampled_spread(tensors, fabric, every)
        assert all(one.equal(other) for one, other in zip(tensors, drawn(fabric.rank), strict=True))
        return spread, fabric.sent

    samples = [torch.cat([tensor.flatten() for tensor in drawn(rank)])[::every] for rank in range(3)]
    mean = sum(samples) / 3
    for sample, (spread, moved) in zip(samples, in_process(3, compare), strict=True):
        torch.testing.assert_close(spread.distance, (sample - mean).square().sum())
        torch.testing.assert_close(spread.norm, mean.square().sum())
        assert moved == 8 * sent(-(-ELEMENTS // every), 3)


def test_nesterov_steps_as_torch_does() -> None:
    start, means = drawn(0)[0], [drawn(rank)[0] for rank in range(1, 5)]
    theirs = start.clone().requires_grad_()
    sgd = torch.optim.SGD([theirs], lr=0.7, momentum=0.9, nesterov=True)
    ours = Stepped(start, torch.zeros_like(start))
    for mean in means:
        theirs.grad = theirs.detach() - mean
        sgd.step()
        ours = nesterov(mean, ours.weight, ours.momentum, 0.7, 0.9)
        torch.testing.assert_close(ours.weight, theirs.detach(), rtol=1e-12, atol=1e-12)


def test_a_whole_step_without_momentum_is_the_mean() -> None:
    start, mean = drawn(0)[0], drawn(1)[0]
    torch.testing.assert_close(nesterov(mean, start, torch.zeros_like(start), 1.0, 0.0).weight, mean)
    assert average(mean, None, None, 0.0, 0.0).weight is mean
