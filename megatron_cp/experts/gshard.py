"""GShard (arXiv:2006.16668, algorithm 1): two experts of a token, the second by chance, in groups with a capacity."""

from torch import Tensor

from megatron_cp.experts.first_come import first_come


def dispatched(gates: Tensor, chosen: Tensor, draws: Tensor | None, capacity: int) -> Tensor:
    """Return [G, N, E], True where a token is sent to an expert.

    gates:  [G, N, E], of the two experts of a token, with a sum of 1; 0 elsewhere
    chosen: [G, N, E], True for these two
    draws:  [G, N, 1], uniform in [0, 1); None where chance has no say, as in evaluation
    """
    # 1. all first choices of a group come before any second one
    best = gates.argmax(-1, keepdim=True)
    first = chosen.new_zeros(chosen.shape).scatter(-1, best, True) & chosen
    # 2. a second choice is made with a probability of twice its gate, which is at most 1/2
    second = chosen & ~first
    if draws is not None:
        second = second & (2 * gates > draws)
    # 3. each expert takes as many as it has room for
    return first_come(first, capacity) | first_come(second, capacity, first.sum(1, keepdim=True))
