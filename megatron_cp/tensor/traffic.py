"""Elements that a rank sends for a tensor-parallel linear, by kind of communication, as formulas of its sizes."""

from typing import NamedTuple


class SentElements(NamedTuple):
    """Elements that a rank sends in all-gathers, reduce-scatters and all-to-alls, or in messages instead of them."""

    gather: float = 0.0
    scatter: float = 0.0
    exchange: float = 0.0

    @property
    def total(self) -> float:
        return sum(self)

    def plus(self, other: "SentElements", times: float = 1.0) -> "SentElements":
        return SentElements(*(a + times * b for a, b in zip(self, other, strict=True)))


class LinearSize(NamedTuple):
    """y [tokens, outputs] = x [tokens, inputs] W^T over a whole tensor-parallel group; `column` or row parallel."""

    tokens: float
    inputs: float
    outputs: float
    column: bool

    @property
    def weight(self) -> float:
        """Elements of the whole weight."""
        return self.inputs * self.outputs


def rest(ranks: int) -> float:
    """Return the share of a tensor that a rank lacks or does not keep: (n - 1)/n."""
    return (ranks - 1) / ranks


def grid_forward(size: LinearSize, tokens: int, weights: int) -> SentElements:
    """Return what one linear on a grid of tokens x weights sends forward; Megatron's layout is weights = 1."""
    activations = size.tokens / weights * (size.inputs if size.column else size.outputs) * rest(tokens)
    weight = size.weight / tokens * rest(weights)
    return (
        SentElements(gather=activations + weight) if size.column else SentElements(gather=weight, scatter=activations)
    )


def grid_backward(size: LinearSize, tokens: int, weights: int, *, split: bool = False) -> SentElements:
    """Return what it sends backward: x is gathered again for the weight gradient, and dy once for both of its uses.

    split: the weight gradient is computed apart, for which a row-parallel linear gathers dy once more
    """
    activations = size.tokens / weights * (size.inputs if size.column else size.outputs) * rest(tokens)
    weight = size.weight / tokens * rest(weights)
    if size.column:
        return SentElements(gather=activations + weight, scatter=activations + weight)
    return SentElements(gather=(2 if split else 1) * activations + weight, scatter=weight)


def heads_exchange(tokens: float, width: float, grid_tokens: int, weights: int) -> SentElements:
    """Return what the exchange around attention sends in each direction for `width` features of all ranks."""
    return SentElements(exchange=tokens * width / (grid_tokens * weights) * rest(weights))


def cube_forward(size: LinearSize, side: int) -> SentElements:
    """Return what one linear on a cube of side^3 ranks sends forward."""
    gather = (size.tokens * size.inputs + size.weight) / side**2 * rest(side)
    return SentElements(gather=gather, scatter=size.tokens * size.outputs / side**2 * rest(side))


def cube_backward(size: LinearSize, side: int, *, split: bool = False) -> SentElements:
    """Return what it sends backward: x, W and dy are gathered again, dx and the weight's gradient are scattered."""
    again = 2 if split else 1
    gather = (size.tokens * (size.inputs + again * size.outputs) + size.weight) / side**2 * rest(side)
    return SentElements(gather=gather, scatter=(size.tokens * size.inputs + size.weight) / side**2 * rest(side))


def cube_exchange(tokens: float, width: float, side: int) -> SentElements:
    """Return what one exchange between Megatron's layout and a cube sends in each direction."""
    return SentElements(exchange=tokens * width / side**3 * rest(side))
