"""The costs that a schedule is played with: times per stage and hop, and memory kept per stage."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_cp.errors import Refused
from megatron_cp.pipeline.action import FORWARD, HEAD, INPUT, LOGITS, WEIGHT, Action, Cell, Overlap, halves
from megatron_cp.pipeline.placement import Placement
from megatron_cp.pipeline.slices import SliceShare

WHOLE = SliceShare(1.0, 1.0, 1.0, 1.0)
LARGEST = 1e15
"""Largest time or memory of a microbatch: sums over a step stay exact enough to be compared."""


class MeetingTimes(NamedTuple):
    """Times of what all ranks send each other for an LM head that lies on all of them.

    share:    of the last stage's output, from its F to S of the other ranks
    logits:   of what S adds up for T, from the last S
    gradient: of what the last stage's backward waits for, from the last S, with two barriers from the last T
    """

    share: float
    logits: float
    gradient: float


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Times in any one unit and memory in any one unit, both per stage and for one whole microbatch.

    forward, input, weight: F, I and W of each stage; a full backward B takes input + weight
    comm:  delay of one hop between different ranks; sender and receiver stay free meanwhile
    kept:  activations from a stage's F to its I
    held:  the part of them that stays until its W
    unit:  how much of `kept` one rank holds for one whole microbatch (M_B): peaks and caps are counted in it
    slices: parts of a microbatch that run like microbatches of their own, each with its part of everything but `comm`
    move:  time in which `unit` of activations moves to the host or the peer, or back
    head:   times of S and T of every rank, where the LM head lies on all of them
    meeting: times of their messages; None for `comm` each
    sync:   time in which two ranks add up the gradients of a stage that both hold a copy of
    tied:   time in which the ranks of the first and the last stage add up the gradients of one embedding that both
        have, once both have run all that they have
    hidden: part of the shorter half of an overlap (F+B) that runs behind the longer one; 0 if both take their sum
    """

    forward: tuple[float, ...]
    input: tuple[float, ...]
    weight: tuple[float, ...]
    comm: float
    kept: tuple[float, ...]
    held: tuple[float, ...]
    unit: float
    hidden: float = 0.0
    move: float = 0.0
    slices: tuple[SliceShare, ...] = ()
    head: tuple[float, float] = (0.0, 0.0)
    meeting: MeetingTimes | None = None
    sync: float = 0.0
    tied: float = 0.0

    def __post_init__(self) -> None:
        for name in ("forward", "input", "weight"):
            for stage, time in enumerate(getattr(self, name)):
                if not 0 < time <= LARGEST:
                    raise Refused(
                        f"times must be positive, got {name} time {time} of stage {stage}; the largest is {LARGEST:g}"
                    )
        single = (("hop", self.comm), ("move", self.move), ("sync", self.sync), ("sum of tied embeddings", self.tied))
        for what, time in single:
            if not 0 <= time <= LARGEST:
                raise Refused(f"the time of a {what} cannot be negative, got {time}; the largest is {LARGEST:g}")
        if not all(0 <= time <= LARGEST for time in self.head):
            raise Refused(f"times of S and T cannot be negative, got {self.head}; the largest is {LARGEST:g}")
        if not 0 <= self.hidden <= 1:
            raise Refused(f"an overlap hides between 0 and 1 of its shorter half, got {self.hidden}")
        for kept, held in zip(self.kept, self.held, strict=True):
            if not 0 <= held <= kept <= LARGEST or kept == 0:
                raise Refused(
                    f"memory needs 0 <= M_W <= M_B and M_B > 0, got M_B = {kept}, M_W = {held}; "
                    f"the largest is {LARGEST:g}"
                )

    def _part(self, action: Action) -> SliceShare:
        """Return the part of a microbatch that the slice of an action is."""
        return self.slices[(action.micro or 0) % len(self.slices)] if self.slices else WHOLE

    def time(self, action: Action) -> float:
        """Return the time of a compute action."""
        stage, kind, _ = action
        if kind in HEAD:
            return self.head[kind != LOGITS]
        part = self._part(action)
        if kind == FORWARD:
            return self.forward[stage] * part.forward
        whole = 0.0 if kind == WEIGHT else self.input[stage] * part.input
        return whole if kind == INPUT else whole + self.weight[stage] * part.weight

    def kept_by(self, action: Action) -> tuple[float, float]:
        """Return `kept` and `held` of the stage and the slice of an action."""
        part = self._part(action).kept
        return self.kept[action.stage] * part, self.held[action.stage] * part

    def saved(self, cell: Cell) -> float:
        """Return the time that a cell saves over its halves one after the other."""
        return self.hidden * min(map(self.time, halves(cell))) if isinstance(cell, Overlap) else 0.0

    def moving(self, action: Action) -> float:
        """Return the time of moving what the stage of an action keeps of its microbatch or slice."""
        return self.move * self.kept_by(action)[0] / self.unit

    def work(self, placement: Placement) -> list[float]:
        """Return the compute time of one microbatch on each rank, nothing overlapped; the mean over pipes."""
        times = [sum(parts) for parts in zip(self.forward, self.input, self.weight, strict=True)]
        return [
            sum(times[stage] for stage in stages) / placement.pipes + sum(self.head) for stages in placement.of_rank
        ]


def uniform(
    placement: Placement,
    times: Sequence[float],
    memory: Sequence[float] = (1.0, 1.0),
    hidden: float = 0.0,
    move: float = 0.0,
    slices: tuple[SliceShare, ...] = (),
) -> Costs:
    """Return the costs of equal stages from those of a whole rank.

    times:  T_F, T_I, T_W and T_comm of all of a rank's layers for one microbatch; a chunk takes T / v, a hop T_comm
    memory: M_B kept from F to I and the part M_W of it kept until W, of all of a rank's layers
    move:   time of moving M_B away, or back
    slices: parts of a microbatch that run one after the other
    """
    if len(times) != 4:
        raise Refused(f"times are T_F,T_I,T_W,T_comm, four numbers; got {len(times)}")
    if len(memory) != 2:
        raise Refused(f"memory is M_B,M_W, two numbers; got {len(memory)}")
    stages, v = len(placement.rank_of), placement.chunks
    forward, input_gradient, weight = ((time / v,) * stages for time in times[:3])
    kept, held = ((size,) * stages for size in memory)
    return Costs(
        forward=forward,
        input=input_gradient,
        weight=weight,
        comm=times[3],
        kept=kept,
        held=held,
        unit=memory[0] * v,
        hidden=hidden,
        move=move,
        slices=slices,
    )
