"""The cells of a pipeline table and their text form: `2F0` is the forward of microbatch 0 on stage 2."""

import re
from typing import NamedTuple

from megatron_cp.errors import Refused

FORWARD = "F"
FULL = "B"
INPUT = "I"
WEIGHT = "W"
SEND_F, RECV_F = "SEND_F", "RECV_F"
SEND_B, RECV_B = "SEND_B", "RECV_B"
REDUCE = "REDUCE"

COMPUTE = frozenset({FORWARD, FULL, INPUT, WEIGHT})
BACKWARD = frozenset({FULL, INPUT})
KINDS = (FORWARD, FULL, INPUT, WEIGHT, SEND_F, RECV_F, SEND_B, RECV_B, REDUCE)

_FORM = re.compile(rf"(\d+)({'|'.join(sorted(KINDS, key=len, reverse=True))})(\d*)")


class Action(NamedTuple):
    """One thing a rank does.

    kind: F forward, B full backward, I input gradient (the zero-bubble papers call it B), W weight gradient;
          SEND_F and SEND_B name the stage that made the tensor, RECV_F and RECV_B the stage that uses it;
          REDUCE starts the gradient reduction of a stage and has no microbatch
    """

    stage: int
    kind: str
    micro: int | None = None

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{'' if self.micro is None else self.micro}"


def first_half(action: Action) -> Action:
    """A whole backward under the name of its first half, everything else as it is: what `awaited` names."""
    return action._replace(kind=INPUT) if action.kind == FULL else action


def parse_action(text: str) -> Action:
    """The action written as `text`; raises ValueError for anything else."""
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
