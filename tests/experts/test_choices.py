"""Choices are counted for each layer and expert, from one reading to the next."""

import torch

from megatron_cp.experts.choices import Choices


def test_choices_are_counted_until_they_are_taken() -> None:
    choices = Choices(layers=3, experts=4, device=torch.device("cpu"))
    sent = torch.tensor([[True, False], [True, True], [False, False]])
    choices.add(1, 6, sent)
    choices.add(1, 6, sent)
    choices.add(2, 4, torch.ones(1, 4, dtype=torch.bool))
    assert choices.take().tolist() == [[0] * 5, [12, 4, 2, 0, 0], [4, 1, 1, 1, 1]]
    assert not choices.take().any()
