"""1F1B with a flush per step: PipeDream-Flush (arXiv:2006.09503), DAPPLE's policy A, Megatron's own.

In slices it is Seq1F1B (arXiv:2406.03488): the last rank starts with all slices of the first sequence.
"""

from megatron_cp.pipeline.action import Action
from megatron_cp.pipeline.schedules.order import alternate, in_order
from megatron_cp.pipeline.vocabulary import Vocabulary, rounds


def one_forward_one_backward(
    p: int, m: int, v: int = 1, slices: int = 1, vocabulary: Vocabulary | None = None
) -> list[list[Action]]:
    """Rank r starts with p - 1 - r forwards. Idle (p - 1)(T_F + T_I + T_W), peak p - r.

    In k slices of equal costs: idle (p - 1)(T_F + T_I + T_W) / k, peak (p - 1 - r + k) / k.
    With the vocabulary over all ranks: peak p - r + 1 with one barrier in each microbatch, p - r + 2 with two.
    """
    if vocabulary:
        return [list(rounds(rank, p, m, vocabulary)) for rank in range(p)]
    return [alternate(*in_order(rank, m, slices=slices), warmup=p - 1 - rank + slices - 1) for rank in range(p)]
