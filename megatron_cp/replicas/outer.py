"""The arithmetic of a sync: the mean of islands' weights, and the step from the last sync towards it."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_cp.comm import Fabric

MOST = 1 << 26
"""Elements that are averaged together, unless one tensor has more; so many are copied at a time."""


SAMPLED = 1024
"""Elements of which one is compared, to find out how far islands are apart."""


class Stepped(NamedTuple):
    """Weights that all islands go on from, and the momentum, which is None for an optimizer without."""

    weight: Tensor
    momentum: Tensor | None


class OuterStep(Protocol):
    """The step of an outer optimizer, from the weights of the last sync, `anchor`, towards the islands' mean."""

    def __call__(
        self, mean: Tensor, anchor: Tensor | None, momentum: Tensor | None, lr: float, decay: float
    ) -> Stepped:
        """Return new tensors; those given stay as they are."""
        ...


def average(mean: Tensor, anchor: Tensor | None, momentum: Tensor | None, lr: float, decay: float) -> Stepped:
    """Go on from the mean (arXiv:1805.09767, algorithm 1)."""
    return Stepped(mean, None)


def nesterov(mean: Tensor, anchor: Tensor | None, momentum: Tensor | None, lr: float, decay: float) -> Stepped:
    """Take the way that the islands went for a gradient of SGD with Nesterov momentum (arXiv:2311.08105, algorithm 1).

    With a learning rate of 1 and without momentum that is the mean.
    """
    assert anchor is not None
    assert momentum is not None
    gradient = anchor - mean
    momentum = decay * momentum + gradient
    return Stepped(anchor - lr * (gradient + decay * momentum), momentum)


class Spread(NamedTuple):
    """Sums of squares over what this rank holds: of its island's distance from the mean, and of the mean."""

    distance: Tensor
    norm: Tensor


@torch.no_grad()
def put_mean(tensors: Sequence[Tensor], islands: Fabric) -> Spread:
    """Put the mean over the islands in the place of each tensor; all islands call it together, with equal shapes.

    Tensors of one dtype and device travel together: each island adds up a part and sends the mean to all, so that all
    have equal bits. See `sent` for the elements.
    """
    distance = norm = torch.zeros(())
    for group in _together(tensors):
        flat = torch.cat([tensor.flatten() for tensor in group])
        parts = torch.nn.functional.pad(flat, (0, -len(flat) % islands.size)).view(islands.size, -1)
        mean = islands.all_gather(islands.reduce_scatter(parts).div_(islands.size)).flatten()[: len(flat)]
        distance = distance.to(flat.device) + (flat - mean).square_().sum()
        norm = norm.to(flat.device) + mean.square().sum()
        for tensor, part in zip(group, mean.split([tensor.numel() for tensor in group]), strict=True):
            tensor.copy_(part.view_as(tensor))
    return Spread(distance, norm)


@torch.no_grad()
def sampled_spread(tensors: Sequence[Tensor], islands: Fabric, every: int = SAMPLED) -> Spread:
    """Return the spread of each so many-th element, counted over all tensors, which stay as they are.

    It takes the place of a local state of all elements in dynamic averaging (arXiv:2405.20988); all islands call it
    together, with equal shapes.
    """
    before, sample = 0, []
    for tensor in tensors:
        sample.append(tensor.detach().flatten()[-before % every :: every].clone())
        before += tensor.numel()
    return put_mean(sample, islands)


def sent(elements: int, islands: int) -> int:
    """Return the elements that a rank sends to average so many; each island adds up an equal part, the last padded."""
    return 2 * (islands - 1) * -(-elements // islands)


def _together(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the tensors in order, as many at a time as have no more elements than may be copied."""
    group: list[Tensor] = []
    for tensor in tensors:
        if group and sum(each.numel() for each in group) + tensor.numel() > MOST:
            yield group
            group = []
        group.append(tensor)
    if group:
        yield group
