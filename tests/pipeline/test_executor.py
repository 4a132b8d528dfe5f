"""The executor of every schedule, over channels with NCCL's rules, computes what one rank alone computes."""

import pytest
import torch

from megatron_cp.pipeline.execute import forward_only, lower
from megatron_cp.pipeline.offload import Offload, offload, smallest_limit
from megatron_cp.pipeline.placement import loop, vee
from megatron_cp.pipeline.profile import lower_split
from tests.pipeline.executed import execute, sequential
from tests.pipeline.played import FIXED, scheduled


@pytest.mark.parametrize("lowering", [lower, lower_split])
@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("name", FIXED)
def test_losses_and_gradients_equal_one_ranks_bit_for_bit(name, p, lowering):
    schedule = scheduled(name, p, 2 * p + 2 if name == "dualpipe-v" else 2 * p)
    losses, gradients = sequential(schedule.placement, schedule.micros)
    ranks = execute(lowering(schedule))
    assert {micro: loss for layers in ranks for micro, loss in layers.losses.items()} == losses
    found = {stage: gradient for layers in ranks for stage, gradient in layers.gradients.items()}
    assert found.keys() == gradients.keys()
    assert all(torch.equal(found[stage], gradients[stage]) for stage in gradients)


@pytest.mark.parametrize("placement", [loop(2), loop(4, 2), vee(3)], ids=str)
def test_evaluation_gives_the_losses_of_one_rank(placement):
    losses, _ = sequential(placement, 5)
    ranks = execute(forward_only(placement, 5), training=False)
    assert {micro: loss for layers in ranks for micro, loss in layers.losses.items()} == losses


@pytest.mark.parametrize("to", ["host", "peer"])
@pytest.mark.parametrize("name", ["1f1b", "interleaved", "gis", "zb-v"])
def test_moved_activations_change_no_bit(name, to):
    schedule = scheduled(name, 4, 8)
    plan = Offload(smallest_limit(schedule, to), to)
    moved, saved = offload(schedule, plan), []
    expected, found = execute(lower(schedule), steps=2), execute(lower(moved), steps=2, saved=saved)
    if name == "zb-v" and to == "peer":
        # all ranks keep the same: there is nothing to lend
        assert moved.table == schedule.table
        return
    for layers, others in zip(found, expected, strict=True):
        assert layers.losses == others.losses
        assert all(torch.equal(layers.gradients[stage], others.gradients[stage]) for stage in layers.gradients)
    assert sum(each.moved for each in saved) > 0
    for rank, each in enumerate(saved):
        # microbatches of the first stage share their input, and the loss is saved too on the last
        size = max(each.sizes.values())
        assert each.peak <= plan.limit * size
        if name == "1f1b" and to == "host" and rank < 3:
            assert each.peak == plan.limit * size
