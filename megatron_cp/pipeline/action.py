"""The cells of a pipeline table and their text form.

`2F0` is the forward of microbatch 0 on stage 2, and `2F3+0B1` overlaps the forward of one chunk with the backward of
another.
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from megatron_cp.errors import Refused

FORWARD = "F"
FULL = "B"
INPUT = "I"
WEIGHT = "W"
LOGITS, LOGITS_BACK = "S", "T"
SEND_F, RECV_F = "SEND_F", "RECV_F"
SEND_B, RECV_B = "SEND_B", "RECV_B"
REDUCE = "REDUCE"
EVICT, LOAD = "EVICT", "LOAD"
HOLD, GIVE = "HOLD", "GIVE"
SHARE, SUM_S, SUM_T = "SHARE", "SUM_S", "SUM_T"
SUM_E, SHARE_E = "SUM_E", "SHARE_E"

HEAD = frozenset({LOGITS, LOGITS_BACK})
COMPUTE = frozenset({FORWARD, FULL, INPUT, WEIGHT}) | HEAD
SUMS = frozenset({SHARE, SUM_S, SUM_T, SUM_E, SHARE_E})
BACKWARD = frozenset({FULL, INPUT})
MOVES = frozenset({EVICT, LOAD})
LENDERS = {EVICT: HOLD, LOAD: GIVE}
"""The lender's action for each move of the owner."""
KINDS = (
    *(FORWARD, FULL, INPUT, WEIGHT, LOGITS, LOGITS_BACK),
    *(SEND_F, RECV_F, SEND_B, RECV_B, REDUCE, SHARE, SUM_S, SUM_T, SUM_E, SHARE_E),
    *(EVICT, LOAD, HOLD, GIVE),
)

_FORM = re.compile(rf"(\d{{1,18}})({'|'.join(sorted(KINDS, key=len, reverse=True))})(\d{{0,18}})")


class Action(NamedTuple):
    """One forward, backward, transfer, reduction or move of activations.

    kind: F forward, B full backward, I input gradient (the zero-bubble papers call it B), W weight gradient;
          SEND_F and SEND_B name the stage that made the tensor, RECV_F and RECV_B the stage that uses it;
          REDUCE starts the gradient reduction of a stage and has no microbatch;
          EVICT moves the activations of a microbatch away and LOAD brings them back, HOLD and GIVE are the part of the
          rank that keeps them meanwhile and name the owner's stage;
          S computes logits and T their weight gradients where the LM head lies on all ranks, SHARE brings all ranks the
          output of the last stage, SUM_S and SUM_T add up what S and T made; SUM_E adds up what all ranks look up for
          the first stage, SHARE_E brings them its gradient; they name the rank's own first stage
    """

    stage: int
    kind: str
    micro: int | None = None

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{'' if self.micro is None else self.micro}"


class Overlap(NamedTuple):
    """A forward and the backward (B or I) of another stage that one rank runs at the same time, as DualPipe does.

    It starts when both have what they need, and what both make is there at its end.
    """

    forward: Action
    backward: Action

    def __str__(self) -> str:
        return f"{self.forward}+{self.backward}"


Cell = Action | Overlap


def halves(cell: Cell) -> tuple[Action, ...]:
    """Return the actions of a cell, the forward of an overlap first."""
    return (cell,) if isinstance(cell, Action) else (cell.forward, cell.backward)


def flat(cells: Iterable[Cell]) -> Iterator[Action]:
    """Yield the actions of the cells in order, those of an overlap one after the other."""
    for cell in cells:
        yield from halves(cell)


def first_half(action: Action) -> Action:
    """Return the I of a whole backward, and any other action as it is: the name under which `awaited` knows it."""
    return action._replace(kind=INPUT) if action.kind == FULL else action


def parse_cell(text: str) -> Cell:
    """Return the action or overlap written as `text`; raises ValueError for anything else."""
    first, plus, second = text.partition("+")
    if not plus:
        return parse_action(text)
    cell = Overlap(parse_action(first), parse_action(second))
    if cell.forward.kind != FORWARD or cell.backward.kind not in BACKWARD or cell.forward.stage == cell.backward.stage:
        raise Refused(f"{text!r} is not an overlap; write a forward and a backward of another stage as in 2F3+0B1")
    return cell


def parse_action(text: str) -> Action:
    """Return the action written as `text`; raises ValueError for anything else."""
    match = _FORM.fullmatch(text)
    if not match or (match[2] == REDUCE) != (match[3] == ""):
        raise Refused(f"{text!r} is not an action; write stage, kind and microbatch as in 2F0; kinds: {KINDS}")
    return Action(int(match[1]), match[2], int(match[3]) if match[3] else None)


def forward(stage: int, micro: int) -> Action:
    return Action(stage, FORWARD, micro)


def full(stage: int, micro: int) -> Action:
    return Action(stage, FULL, micro)


def input_gradient(stage: int, micro: int) -> Action:
    return Action(stage, INPUT, micro)


def weight_gradient(stage: int, micro: int) -> Action:
    return Action(stage, WEIGHT, micro)
