"""Experts that take the tokens of a group as they come, up to a capacity: Switch (arXiv:2101.03961, 2.2).

Tokens are those of one rank, [T, E] with a column for each expert, position by position and in each the samples.
"""

from torch import Tensor
from torch.nn.functional import pad


def in_groups(x: Tensor, samples: int, size: int | None) -> Tensor:
    """Return x [T, E] as groups [G, N, E], a copy where groups have a size.

    samples: at each position
    size:    N, consecutive tokens of one sample, the last ones of which may be short and end in zeros; None for one
        group of all T
    """
    if size is None:
        return x.unsqueeze(0)
    by_sample = x.view(-1, samples, x.shape[1]).transpose(0, 1)
    whole = pad(by_sample, (0, 0, 0, -by_sample.shape[1] % size))
    return whole.reshape(-1, size, x.shape[1])


def from_groups(x: Tensor, samples: int, size: int | None, tokens: int) -> Tensor:
    """Return groups [G, N, E] as [T, E] again."""
    if size is None:
        return x.squeeze(0)
    by_sample = x.reshape(samples, -1, x.shape[2])[:, : tokens // samples]
    return by_sample.transpose(0, 1).reshape(tokens, x.shape[2])


def first_come(wanted: Tensor, capacity: int, before: Tensor | int = 0) -> Tensor:
    """Return which tokens find room at the experts that they want.

    wanted: [G, N, E], True where a token wants an expert
    before: [G, 1, E], tokens of the group that have come to each expert already
    """
    return wanted & (wanted.cumsum(1) + before <= capacity)
