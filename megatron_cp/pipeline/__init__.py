"""The registry of pipeline schedules. Rules are pure functions from sizes to tables; none imports torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_cp.errors import Refused
from megatron_cp.pipeline import table_file
from megatron_cp.pipeline.action import INPUT, WEIGHT, Cell, flat
from megatron_cp.pipeline.placement import ONE_PIPE
from megatron_cp.pipeline.schedule import Table
from megatron_cp.pipeline.schedules import (
    bpipe,
    breadth_first,
    chimera,
    controllable_memory,
    dapple,
    dualpipe,
    gpipe,
    interleaved,
    interleaved_zero_bubble,
    one_forward_one_backward,
    pipe_offload,
    pipedream,
    zero_bubble,
)
from megatron_cp.pipeline.vocabulary import Vocabulary
from megatron_cp.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One schedule.

    table:        (p, m, v) -> per rank the compute actions; None for `auto`, which also needs times and memory
    placement:    loop or v; two-way where two copies of the model go through the ranks
    chunks:       the only v it supports, None where v is the user's choice
    usual:        the v it takes when none is given
    split:        True if it needs the backward split into I and W
    takes_warmup: True if `table` takes a warm-up multiplier too
    lends:        True if ranks lend activations to their peers, down to BPipe's limit
    takes_slices: True if `table` takes slices of each sequence too, which then run like microbatches
    own_vocabulary: True if `table` places S and T of a vocabulary over all ranks itself; others get them placed
    overlaps:     True if `table` can write a forward and a backward that run at the same time as one action
    delay:        (p, m) -> how far ranks run ahead of the updates, where steps end without a flush; `table`
                  then takes the step of a run too
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
    takes_slices: bool = False
    own_vocabulary: bool = False
    lends: bool = False
    overlaps: bool = False
    delay: Callable[[int, int], pipedream.Delay] | None = None
    aliases: tuple[str, ...] = ()

    @property
    def two_copies(self) -> bool:
        """True if ranks hold parts of two copies of the model."""
        return self.placement not in ONE_PIPE

    @property
    def no_vocabulary(self) -> str | None:
        """Why S and T of a vocabulary over all ranks have no place in its tables; None where they have."""
        if self.table is None:
            return "schedules from times of F, I and W alone"
        if self.two_copies:
            return "holds two copies of the model, with two last stages"
        if self.delay:
            return "ends its steps without a flush, and S and T belong to one step"
        return "moves activations" if self.lends else None

    def make(
        self,
        p: int,
        m: int,
        v: int,
        warmup: float | None = None,
        overlapped: bool = False,
        slices: int = 1,
        step: pipedream.StepOfRun = pipedream.USUAL,
        vocabulary: Vocabulary | None = None,
    ) -> Table:
        """Return the rule's table, not checked."""
        assert self.table, f"{self.name} has no table of its own"
        options: dict[str, Any] = {} if warmup is None else {"warmup": warmup}
        if overlapped:
            options["overlapped"] = True
        if slices > 1:
            options["slices"] = slices
        if step != pipedream.USUAL:
            options["step"] = step
        if vocabulary:
            options["vocabulary"] = vocabulary
        return tuple(map(tuple, self.table(p, m, v, **options)))


TABLE_FILE = "table:"
"""In front of a file's name, in the place of a schedule's name."""


class Schedules(Registry[Rule]):
    """Rules by name, and tables in files by TABLE_FILE and the file's name."""

    def get(self, name: str) -> Rule:
        """Return the entry called `name`; raise Refused with a suggestion, or with the fault of a file."""
        if not name.startswith(TABLE_FILE):
            return super().get(name)
        file = Path(name.removeprefix(TABLE_FILE))
        return _rule_of(file, file.stat().st_mtime_ns if file.exists() else 0)


@lru_cache(8)
def _rule_of(file: Path, _: int) -> Rule:
    """Return the rule that knows the one table of `file`; a file that is written again is read again."""
    read = table_file.read(file)
    where, kinds = read.placement, {action.kind for cells in read.table for action in flat(cells)}
    if where.pipes > 1:
        raise Refused(f"{file} has two pipes in opposite directions, which only simulate plays; make it one pipe")
    if where.name not in ONE_PIPE:
        raise Refused(f"{file}: stages lie on ranks {where.rank_of}; place them around the ranks, or down and up again")
    if read.to is not None:
        raise Refused(f"{file} moves activations by itself; leave the moves to --pp-offload")
    if read.barriers:
        raise Refused(f"{file} has S and T of a vocabulary over all ranks, which only simulate plays; leave them out")
    sizes = (where.ranks, read.micros, where.chunks)

    def table(p: int, m: int, v: int, overlapped: bool = False) -> Table:
        if (p, m, v) != sizes:
            has, got = ("p = {}, m = {}, v = {}".format(*each) for each in (sizes, (p, m, v)))
            raise Refused(f"{file} is a table for {has}, got {got}; p are ranks, m microbatches, v chunks per rank")
        return read.table

    return Rule(
        name=f"{TABLE_FILE}{file}",
        table=table,
        paper="a table in a file",
        what="a table in a file",
        placement=where.name,
        chunks=where.chunks,
        usual=where.chunks,
        split=bool(kinds & {INPUT, WEIGHT}),
        overlaps=read.pairs > 0,
    )


SCHEDULES = Schedules(
    "pipeline schedule",
    [
        Rule(
            name="gpipe",
            table=gpipe.gpipe,
            paper="arXiv:1811.06965",
            what="all forwards, then all backwards",
            split=False,
            takes_slices=True,
        ),
        Rule(
            name="1f1b",
            table=one_forward_one_backward.one_forward_one_backward,
            paper="arXiv:2006.09503",
            what="one forward, one backward, flushed every step",
            split=False,
            takes_slices=True,
            own_vocabulary=True,
            aliases=("dapple-a", "pipedream-flush"),
        ),
        Rule(
            name="bpipe",
            table=bpipe.bpipe,
            paper="ICML 2023 (BPipe)",
            what="1F1B whose early ranks lend activations to late ones",
            split=False,
            lends=True,
        ),
        Rule(
            name="dapple-b",
            table=dapple.policy_b,
            paper="arXiv:2007.01045",
            what="1F1B with about twice the warm-up",
            split=False,
            takes_slices=True,
        ),
        Rule(
            name="interleaved",
            table=interleaved.interleaved,
            paper="arXiv:2104.04473",
            what="1F1B over v chunks per rank",
            chunks=None,
            usual=2,
            split=False,
            takes_slices=True,
            aliases=("1f1b-i",),
        ),
        Rule(
            name="breadth-first",
            table=breadth_first.breadth_first,
            paper="arXiv:2211.05953",
            what="all microbatches through a chunk before the next one",
            chunks=None,
            usual=2,
            split=False,
            aliases=("looped-bfs",),
        ),
        Rule(
            name="zb-h1",
            table=zero_bubble.h1,
            paper="arXiv:2401.10241, 2.2",
            what="1F1B's memory, W fills the drain",
            takes_slices=True,
        ),
        Rule(
            name="zb-h2",
            table=zero_bubble.h2,
            paper="arXiv:2401.10241, 2.2",
            what="spans without idle for twice the memory",
            takes_slices=True,
        ),
        Rule(
            name="izb",
            table=interleaved_zero_bubble.izb,
            paper="arXiv:2104.04473 with arXiv:2401.10241",
            what="interleaved, W fills the drain",
            chunks=None,
            usual=2,
            takes_warmup=True,
            takes_slices=True,
            aliases=("interleaved-zero-bubble",),
        ),
        Rule(
            name="gis",
            table=pipe_offload.gis,
            paper="arXiv:2503.01328, 3",
            what="interleaved, split, memory of 1F1B",
            chunks=None,
            usual=2,
            takes_slices=True,
        ),
        Rule(
            name="gis-h",
            table=pipe_offload.gis_h,
            paper="arXiv:2503.01328, 3",
            what="GIS in groups of half the ranks",
            chunks=None,
            usual=2,
        ),
        Rule(
            name="zb-v",
            table=zero_bubble.zb_v,
            paper="arXiv:2401.10241, 6",
            what="zero bubble on the V",
            placement="v",
            chunks=2,
            usual=2,
            aliases=("zbv",),
        ),
        Rule(
            name="v-half",
            table=controllable_memory.v_half,
            paper="arXiv:2405.15362",
            what="half of 1F1B's memory",
            placement="v",
            chunks=2,
            usual=2,
        ),
        Rule(
            name="v-min",
            table=controllable_memory.v_min,
            paper="arXiv:2405.15362",
            what="a third of 1F1B's memory",
            placement="v",
            chunks=2,
            usual=2,
        ),
        Rule(
            name="1f1b-v",
            table=controllable_memory.one_forward_one_backward_v,
            paper="arXiv:2405.15362",
            what="1F1B on the V, two thirds of its memory",
            placement="v",
            chunks=2,
            usual=2,
            split=False,
        ),
        Rule(
            name="dualpipe-v",
            table=dualpipe.dualpipe_v,
            paper="arXiv:2412.19437",
            what="DualPipe folded on the V",
            placement="v",
            chunks=2,
            usual=2,
            overlaps=True,
        ),
        Rule(
            name="chimera",
            table=chimera.chimera,
            paper="arXiv:2107.06925",
            what="half of the microbatches go up the ranks, through a second copy of the model",
            placement="two-way",
            split=False,
        ),
        Rule(
            name="chimera-zb",
            table=chimera.chimera_zb,
            paper="arXiv:2107.06925 with arXiv:2401.10241",
            what="chimera, W fills the gaps",
            placement="two-way",
        ),
        Rule(
            name="dualpipe",
            table=dualpipe.dualpipe,
            paper="arXiv:2412.19437, 3.2.1",
            what="zero bubble in both directions, through two copies of the model",
            placement="two-way",
            overlaps=True,
        ),
        Rule(
            name="2bw",
            table=pipedream.without_flush,
            paper="arXiv:2006.09503, 3.1",
            what="1F1B without a flush, weights one update late",
            split=False,
            delay=pipedream.two_versions,
            aliases=("pipedream-2bw",),
        ),
        Rule(
            name="pipedream",
            table=pipedream.without_flush,
            paper="arXiv:1806.03377, 3.3",
            what="1F1B without a flush, weights up to p - 1 updates late",
            split=False,
            delay=pipedream.stashing,
        ),
        Rule(
            name="pipedream-vertical",
            table=pipedream.without_flush,
            paper="arXiv:1806.03377, 3.3",
            what="pipedream, equally late on all ranks",
            split=False,
            delay=pipedream.vertical_sync,
        ),
        Rule(
            name="auto",
            table=None,
            paper="list scheduling on measured times",
            what="fitted to times and memory cap",
            chunks=None,
        ),
    ],
    group="megatron_cp.schedules",
)


def on_v(name: str | None, placement: str | None = None) -> bool:
    """Return True if this schedule places its stages on the V; `placement` is the user's choice for `auto`."""
    return name is not None and (placement or SCHEDULES.get(name).placement) == "v"
