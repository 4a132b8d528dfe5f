"""Exchange `lina`: messages of experts come before reductions of gradients (Lina, USENIX ATC 2023, section 4).

A reduction that has started cannot be stopped, and shares links with the exchange that follows. So one that is ready in
backward waits until the next exchange is over, and runs beside what is computed before the one after it; once no
exchange is to come it starts at once. What Lina cuts into micro-ops are pieces of tokens here, and Megatron's buckets.
"""

from collections import deque
from collections.abc import Callable


class ExchangePriority:
    """Exchanges that the backwards of a rank still have, and reductions of its gradients that wait for them.

    Reductions start in the order in which they are ready, which is the same on ranks that run the same layers.

    held: reductions that have waited, in all steps
    """

    def __init__(self) -> None:
        self.held = 0
        self._coming = 0
        self._waiting: deque[Callable[[], object]] = deque()

    def expect(self) -> None:
        """Note a forward whose backward will have an exchange."""
        self._coming += 1

    def over(self) -> None:
        """Note that the exchange of a backward is over, and start all that waits."""
        self._coming = max(0, self._coming - 1)
        self._start()

    def finish(self) -> None:
        """Note the end of all backwards of a step, whatever was expected, and start all that waits."""
        self._coming = 0
        self._start()

    def start(self, reduction: Callable[[], object]) -> None:
        """Start a reduction, or let it wait for the next exchange where one is to come."""
        if self._coming:
            self.held += 1
            self._waiting.append(reduction)
        else:
            reduction()

    def _start(self) -> None:
        while self._waiting:
            self._waiting.popleft()()
