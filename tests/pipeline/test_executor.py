"""The executor of every schedule, over channels with NCCL's rules, computes what one rank alone computes."""

import pytest
import torch

from megatron_cp.pipeline.execute import forward_only, lower
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
