"""Cut a sequence into slices of equal cost, and what each costs (Seq1F1B, arXiv:2406.03488; TeraPipe, 2102.07988).

Under a causal mask later tokens see more keys, so slices of equal length cost more and more, and every rank waits for
the last. With the attention's share a of a whole sequence's time, the first x of it costs (1 - a) x + a x^2.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from megatron_cp.errors import Refused

FLASH_BACKWARD = 2.5
"""Backward of fused attention over its forward: five products against two."""
STEPS = 60


class AttentionShares(NamedTuple):
    """The part of F, I and W of a whole sequence that is attention; the rest grows with the number of tokens.

    reach: keys that a query sees under a window, as a part of the sequence; 1 without one
    """

    forward: float = 0.0
    input: float = 0.0
    weight: float = 0.0
    reach: float = 1.0

    def grown(self, share: float, x: float) -> float:
        """Return the cost of the first x of a sequence, as a part of the whole sequence's."""
        seen, whole = (_pairs(end, self.reach) for end in (x, 1.0))
        return (1 - share) * x + share * seen / whole


def _pairs(x: float, reach: float) -> float:
    """Return the area under min(t, reach) up to x: the keys that queries see."""
    return x * x / 2 if x <= reach else reach * reach / 2 + reach * (x - reach)


def flash_shares(share: float, times: Sequence[float], reach: float = 1.0) -> AttentionShares:
    """Return the shares where attention is `share` of F, takes 2.5 times that in I, and has no weights.

    times: F, I and W of the whole sequence
    Raises ValueError where I has no room for it.
    """
    if not 0 <= share <= 1:
        raise Refused(f"the attention's share of a forward lies between 0 and 1, got {share:g}")
    forward, backward, _ = times[:3]
    taken = FLASH_BACKWARD * share * forward
    if taken > backward * (1 + 1e-9):
        raise Refused(
            f"attention that is {share:g} of T_F = {forward:g} takes {taken:g} in the backward, more than T_I = "
            f"{backward:g}; give T_I of at least that"
        )
    return AttentionShares(share, min(1.0, taken / backward), 0.0, reach)


def flash_times(share: float) -> tuple[float, float, float]:
    """Return T_F = 1, T_I and T_W of a sequence whose attention is `share` of T_F and whose linears take 1:1:1."""
    return 1.0, 1 - share + FLASH_BACKWARD * share, max(1 - share, 1e-9)


class SliceShare(NamedTuple):
    """One slice's part of the whole sequence's F, I, W and activations."""

    forward: float
    input: float
    weight: float
    kept: float


def equal_shares(slices: int) -> tuple[SliceShare, ...]:
    """Return slices of equal length without attention."""
    return (SliceShare(*(1 / slices,) * 4),) * slices


def shares(lengths: Sequence[float], attention: AttentionShares) -> tuple[SliceShare, ...]:
    """Return the shares of slices of these lengths, in any unit."""
    total = sum(lengths)
    ends = [end / total for end in accumulate(lengths, initial=0)]

    def part(share: float, start: float, end: float) -> float:
        return attention.grown(share, end) - attention.grown(share, start)

    return tuple(
        SliceShare(
            part(attention.forward, *ends_of),
            part(attention.input, *ends_of),
            part(attention.weight, *ends_of),
            ends_of[1] - ends_of[0],
        )
        for ends_of in pairwise(ends)
    )


def borders(slices: int, prefix: Callable[[float], float]) -> list[float]:
    """Return where the slices end, as parts of the sequence, so that each takes an equal part of `prefix`(1)."""
    whole, ends = prefix(1.0), []
    for number in range(1, slices):
        low, high = 0.0, 1.0
        for _ in range(STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if prefix(middle) < whole * number / slices else (low, middle)
        ends.append(high)
    return [*ends, 1.0]


def fractions(slices: int, attention: AttentionShares, times: Sequence[float], split: bool) -> list[float]:
    """Return lengths, as parts of a sequence, of slices that cost the same.

    times: F, I and W of the whole sequence
    split: the backward is split, and W fills gaps: slices are equal in F + I, otherwise in F + I + W
    """
    weights = times[:2] if split else times[:3]

    def prefix(x: float) -> float:
        return sum(time * attention.grown(share, x) for time, share in zip(weights, attention[:3], strict=False))

    return [end - start for start, end in pairwise([0.0, *borders(slices, prefix)])]


def cut(tokens: int, multiple: int, lengths: Sequence[float]) -> list[int]:
    """Return whole lengths near `lengths`, parts of a sequence of `tokens`: multiples of `multiple`, none empty.

    Raises ValueError where there are fewer multiples than slices, or the sequence is none.
    """
    slices, units = len(lengths), tokens // multiple
    _check_cut(slices, tokens, multiple)
    ends = [0]
    for number, end in enumerate(accumulate(lengths), 1):
        nearest = int(end / sum(lengths) * units + 0.5)
        ends.append(min(max(nearest, ends[-1] + 1), units - (slices - number)))
    return [(end - start) * multiple for start, end in pairwise(ends)]


def _check_cut(slices: int, tokens: int, multiple: int) -> None:
    units = tokens // multiple
    if tokens % multiple:
        raise Refused(f"a sequence in slices needs a multiple of {multiple} tokens, got {tokens}")
    if slices > units:
        raise Refused(
            f"{slices} slices of {tokens} tokens in multiples of {multiple} leave some empty; "
            f"take at most {units} slices"
        )


def model_lengths(
    slices: int, tokens: int, multiple: int, parameters: float, attention_width: float, split: bool
) -> list[int]:
    """Return the tokens of each slice, cut by cost from the sizes of a model, as `cut` and `attention_share` take them.

    split: the backward is split
    Raises ValueError where a slice would be empty.
    """
    # before a search for each border
    _check_cut(slices, tokens, multiple)
    share = attention_share(tokens, parameters, attention_width)
    times = flash_times(share)
    return cut(tokens, multiple, fractions(slices, flash_shares(share, times), times, split))


def attention_share(tokens: int, layer_parameters: float, attention_width: float) -> float:
    """Return the part of a layer's forward that is causal attention: 2 S a flops of a token against 2 N.

    tokens:           S, of the whole sequence
    layer_parameters: N, those that a token meets in one layer
    attention_width:  a, query heads times their dimension
    """
    pairs = tokens * attention_width
    return pairs / (pairs + layer_parameters)
