"""The registry of pipeline schedules. Rules are pure functions from sizes to tables; none imports torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_cp.pipeline.action import Cell
from megatron_cp.pipeline.schedule import Table
from megatron_cp.pipeline.schedules import (
    breadth_first,
    controllable_memory,
    dapple,
    dualpipe,
    gpipe,
    interleaved,
    interleaved_zero_bubble,
    one_forward_one_backward,
    pipe_offload,
    zero_bubble,
)
from megatron_cp.registry import Registry


@dataclass(frozen=True)
class Rule:
    """One schedule.

    table:        (p, m, v) -> per rank the compute actions; None for `auto`, which also needs times and memory
    placement:    loop or v
    chunks:       the only v it supports, None where v is the user's choice
    usual:        the v it takes when none is given
    split:        True if it needs the backward split into I and W
    takes_warmup: True if `table` takes a warm-up multiplier too
    overlaps:     True if `table` can write a forward and a backward that run at the same time as one action
    """

    name: str
    table: Callable[..., Sequence[Sequence[Cell]]] | None
    paper: str
    what: str
    placement: str = "loop"
    chunks: int | None = 1
    usual: int = 1
    split: bool = True
    takes_warmup: bool = False
    overlaps: bool = False
    aliases: tuple[str, ...] = ()

    def make(self, p: int, m: int, v: int, warmup: float | None = None, overlapped: bool = False) -> Table:
        """Return the rule's table, not checked."""
        assert self.table, f"{self.name} has no table of its own"
        options: dict[str, float] = {} if warmup is None else {"warmup": warmup}
        if overlapped:
            options["overlapped"] = True
        return tuple(map(tuple, self.table(p, m, v, **options)))


SCHEDULES = Registry(
    "pipeline schedule",
    [
        Rule("gpipe", gpipe.gpipe, "arXiv:1811.06965", "all forwards, then all backwards", split=False),
        Rule(
            "1f1b",
            one_forward_one_backward.one_forward_one_backward,
            "arXiv:2006.09503",
            "one forward, one backward, flushed every step",
            split=False,
            aliases=("dapple-a", "pipedream-flush"),
        ),
        Rule("dapple-b", dapple.policy_b, "arXiv:2007.01045", "1F1B with about twice the warm-up", split=False),
        Rule(
            "interleaved",
            interleaved.interleaved,
            "arXiv:2104.04473",
            "1F1B over v chunks per rank",
            chunks=None,
            usual=2,
            split=False,
            aliases=("1f1b-i",),
        ),
        Rule(
            "breadth-first",
            breadth_first.breadth_first,
            "arXiv:2211.05953",
            "all microbatches through a chunk before the next one",
            chunks=None,
            usual=2,
            split=False,
            aliases=("looped-bfs",),
        ),
        Rule("zb-h1", zero_bubble.h1, "arXiv:2401.10241, 2.2", "1F1B's memory, W fills the drain"),
        Rule("zb-h2", zero_bubble.h2, "arXiv:2401.10241, 2.2", "spans without idle for twice the memory"),
        Rule(
            "izb",
            interleaved_zero_bubble.izb,
            "arXiv:2104.04473 with arXiv:2401.10241",
            "interleaved, W fills the drain",
            chunks=None,
            usual=2,
            takes_warmup=True,
            aliases=("interleaved-zero-bubble",),
        ),
        Rule(
            "gis", pipe_offload.gis, "arXiv:2503.01328, 3", "interleaved, split, memory of 1F1B", chunks=None, usual=2
        ),
        Rule(
            "gis-h", pipe_offload.gis_h, "arXiv:2503.01328, 3", "GIS in groups of half the ranks", chunks=None, usual=2
        ),
        Rule("zb-v", zero_bubble.zb_v, "arXiv:2401.10241, 6", "zero bubble on the V", "v", 2, 2, aliases=("zbv",)),
        Rule("v-half", controllable_memory.v_half, "arXiv:2405.15362", "half of 1F1B's memory", "v", 2, 2),
        Rule("v-min", controllable_memory.v_min, "arXiv:2405.15362", "a third of 1F1B's memory", "v", 2, 2),
        Rule(
            "1f1b-v",
            controllable_memory.one_forward_one_backward_v,
            "arXiv:2405.15362",
            "1F1B on the V, two thirds of its memory",
            "v",
            2,
            2,
            split=False,
        ),
        Rule(
            "dualpipe-v",
            dualpipe.dualpipe_v,
            "arXiv:2412.19437",
            "DualPipe folded on the V",
            "v",
            2,
            2,
            overlaps=True,
        ),
        Rule("auto", None, "list scheduling on measured times", "fitted to times and memory cap", chunks=None),
    ],
)


def on_v(name: str | None, placement: str | None = None) -> bool:
    """Return True if this schedule places its stages on the V; `placement` is the user's choice for `auto`."""
    return name is not None and (placement or SCHEDULES.get(name).placement) == "v"
