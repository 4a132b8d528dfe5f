"""Numbers of the microbatches of a layer, which one that is computed again keeps."""

from typing import NamedTuple

import torch

WAITING = 4096
"""Most microbatches of a layer that wait to be computed again."""


class Turn(NamedTuple):
    """The number of a step, and of one microbatch of a layer in it."""

    step: int
    microbatch: int


class Turns:
    """Counts the microbatches of a layer, and gives one that is computed again the number that it had.

    A recomputation restores torch's random state of its first time, wherever it stands in the schedule: a number drawn
    there says which microbatch it is.
    """

    def __init__(self) -> None:
        self._next = Turn(0, 0)
        self._waiting: dict[int, Turn] = {}

    def take(self, step: int) -> Turn:
        """Return the turn of the microbatch that is computed now, in training."""
        # on the host, whatever the device is
        key = int(torch.randint(2**62, (), device="cpu"))
        if torch.is_grad_enabled() and key in self._waiting:
            return self._waiting.pop(key)
        turn = self._next if self._next.step == step else Turn(step, 0)
        self._next = Turn(step, turn.microbatch + 1)
        if not torch.is_grad_enabled():
            self._waiting[key] = turn
            if len(self._waiting) > WAITING:
                del self._waiting[next(iter(self._waiting))]
        return turn
