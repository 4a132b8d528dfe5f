"""Weights that are gathered from their shards are the whole ones, and gradients come home as sums."""

import pytest
import torch

from megatron_cp.comm import in_process
from megatron_cp.experts.gathered_weights import GatheredWeights, ShardCut, gathered_here

HIDDEN, FFN, TOKENS = 4, 6, 5


def wholes():
    """Gates above values [2 f, h], a linear back [h, f], and one that is not gated."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2 * FFN, HIDDEN), (HIDDEN, FFN), (FFN, HIDDEN))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def shard_of(weight, cut, rank, ranks):
    parts = weight.chunk(cut.parts, cut.dim)
    return torch.cat([part.chunk(ranks, cut.dim)[rank] for part in parts], cut.dim).clone().requires_grad_()


CUTS = (ShardCut(0, 2), ShardCut(1), ShardCut(0))


def outcome(kept, fabric):
    """The weights of a rank, gradients of its shards for a loss of its own, gathers, scatters and bytes."""
    shards = [shard_of(weight, cut, fabric.rank, fabric.size) for weight, cut in zip(wholes(), CUTS, strict=True)]
    gathered = GatheredWeights(fabric, CUTS, [shard.shape for shard in shards])
    row = gathered.gather(shards)
    found = {}
    keep = (lambda weights, gradients: found.update(zip(weights, gradients, strict=True))) if kept else None
    _, whole = gathered_here(gathered, shards, torch.zeros(TOKENS, HIDDEN), row, keep)
    weights = gathered.weights(whole)
    sum((weight**2).sum() * (fabric.rank + 1) for weight in weights).backward()
    gradients = [found.get(shard, shard.grad) for shard in shards]
    return [weight.detach() for weight in weights], gradients, (gathered.there, gathered.home, gathered.bytes)


@pytest.mark.parametrize("kept", [False, True], ids=["by autograd", "kept"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_weights_are_whole_and_gradients_sums_over_ranks(ranks, kept):
    size = sum(weight.numel() for weight in wholes())
    for rank, (weights, gradients, counted) in enumerate(in_process(ranks, lambda fabric: outcome(kept, fabric))):
        assert all(map(torch.equal, weights, wholes()))
        times = sum(range(1, ranks + 1))
        for cut, weight, gradient in zip(CUTS, wholes(), gradients, strict=True):
            torch.testing.assert_close(gradient, 2 * times * shard_of(weight, cut, rank, ranks).detach())
        # a shard to each other rank, and as much of gradients
        assert counted == (1, 1, 2 * 8 * (ranks - 1) * size // ranks)
