"""GIS and GIS-H of PipeOffload (arXiv:2503.01328): interleaving with a split backward and a shorter warm-up."""

from megatron_cp.pipeline.action import Action
from megatron_cp.pipeline.placement import loop
from megatron_cp.pipeline.schedules.order import alternate, delay_weights, in_groups, joined


def gis(p: int, m: int, v: int, slices: int = 1) -> list[list[Action]]:
    """W right behind its I, warm-up (v - 1)p + p - 1 - r. Idle (p - 1)(T_F + T_I) / v, peak v p chunks."""
    return _grouped(p, m, v, group=p, slices=slices)


def gis_h(p: int, m: int, v: int) -> list[list[Action]]:
    """Groups of g = p / 2: about half the memory, g(v - 1) + p chunks, for (p - g)(v - 1) chunk times more idle."""
    return _grouped(p, m, v, group=(p + 1) // 2)


def _grouped(p: int, m: int, v: int, group: int, slices: int = 1) -> list[list[Action]]:
    first = v * max(map(len, joined(m, slices, group))) - 1 if slices > 1 else (v - 1) * group
    return [
        list(
            delay_weights(
                alternate(*in_groups(stages, m, group, split=True, slices=slices), warmup=first + p - 1 - rank), 0
            )
        )
        for rank, stages in enumerate(loop(p, v).of_rank)
    ]
