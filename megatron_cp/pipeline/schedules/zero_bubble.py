"""Zero Bubble (arXiv:2401.10241): the handcrafted H1 and H2, and ZB-V of section 6.

The backward is split: I, the gradient of the input, is all that the rank before waits for; W, the gradient of the
weights, fills gaps. 1F1B and H1 on the last of two ranks with 3 microbatches, where B = I + W:

    1f1b     F0 B0      F1 B1      F2 B2
    zb-h1    F0 I0 F1 I1 W0 F2 I2 W1 W2
"""

from collections.abc import Iterator
from itertools import chain, repeat

from megatron_cp.pipeline.action import Action, forward, input_gradient, weight_gradient
from megatron_cp.pipeline.placement import vee
from megatron_cp.pipeline.schedules.order import alternate, delay_weights, in_order


def h1(p: int, m: int, v: int = 1, slices: int = 1) -> list[list[Action]]:
    """1F1B's warm-up; on rank r a W trails r input gradients. Idle (p - 1)(T_F + T_I - T_W) for T_W <= T_I, peak p.

    In k slices of equal costs both shrink: idle by k, and the peak is 1 + (p - 1) / k on every rank.
    """
    return [
        list(
            delay_weights(
                alternate(*in_order(rank, m, split=True, slices=slices), warmup=p - 1 - rank + slices - 1), rank
            )
        )
        for rank in range(p)
    ]


def h2(p: int, m: int, v: int = 1, slices: int = 1) -> list[list[Action]]:
    """Twice the warm-up and twice the delay. Every rank's span is without idle for equal times; peak 2p - 1."""
    return [
        list(
            delay_weights(
                alternate(*in_order(rank, m, split=True, slices=slices), warmup=2 * (p - 1 - rank) + slices - 1),
                2 * rank,
            )
        )
        for rank in range(p)
    ]


def zb_v(p: int, m: int, v: int = 2) -> list[list[Action]]:
    """Two chunks on the V. Idle (p - 1) chunk times and peak 2p chunks on every rank for equal times."""
    enough = max(m, 2 * p - 1)
    ranks = [_count(_zb_v_kinds(rank, p, enough), stages) for rank, stages in enumerate(vee(p).of_rank)]
    return [[action for action in actions if (action.micro or 0) < m] for actions in ranks]


def _zb_v_kinds(rank: int, p: int, m: int) -> Iterator[str]:
    """Yield the phases of section 6 on one rank: `f`, `i`, `w` are of the first chunk, `F`, `I`, `W` of the second."""
    # 1. warm-up: forwards of the first chunk until the first microbatch has come back up the V
    yield from "f" * (2 * (p - rank) - 1)
    # 2. forwards of both chunks in turn
    yield from "Ff" * rank
    # 3. the first backwards, of the second chunk
    yield from "FIW" * (p - rank)
    # 4. steady state: one microbatch forward, backward and W in each chunk
    yield from chain.from_iterable(repeat("fiwFIW", m - 2 * p + 1 + rank))
    # 5. drain: no forwards of the first chunk are left
    yield from "iwFIW" * (p - 1 - rank)
    # 6. input gradients go first, so that the ranks before can go on
    yield from "iI" * rank
    yield from "iw" * (p - rank)
    # 7. the weight gradients that are left
    yield from "W" * rank
    yield from "w" * rank


def _count(kinds: Iterator[str], stages: tuple[int, ...]) -> list[Action]:
    """Return the actions of `kinds`, each kind of each chunk numbered in microbatch order."""
    seen = dict.fromkeys("fiwFIW", 0)
    actions = []
    for kind in kinds:
        make = {"f": forward, "i": input_gradient, "w": weight_gradient}[kind.lower()]
        actions.append(make(stages[kind.isupper()], seen[kind]))
        seen[kind] += 1
    return actions
