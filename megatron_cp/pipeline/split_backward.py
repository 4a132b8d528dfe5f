"""The backward of a linear in two halves: the input gradient at once, the weight gradient when its turn comes.

An input gradient I runs autograd as usual, but what a weight gradient needs (the linear's input and the gradient of its
output) is put into a queue; W takes it out again (Zero Bubble, arXiv:2401.10241, section 3). The weight itself takes no
part in autograd while a split schedule runs, so there are no dummy gradients that could be added up by mistake.
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, no_grad


class Work(NamedTuple):
    """A weight gradient that waits, and the tensors that it is called with; none where a module keeps its own."""

    run: Callable[..., None]
    keeps: tuple[Tensor, ...]

    def __call__(self) -> None:
        self.run(*self.keeps)


class WeightQueue:
    """Weight gradients that wait, under the key of the I that put them there, in the order of that backward.

    open:   True while linears put their weight gradients into this queue
    always: True if some of them have no whole backward, so that a B goes through the queue too
    on_put: called with the tensors of every weight gradient that starts to wait, for measurements
    """

    def __init__(self) -> None:
        self.open = self.always = False
        self.on_put: Callable[[tuple[Tensor, ...]], None] | None = None
        self._waiting: dict[Hashable, deque[Work]] = {}
        self._key: Hashable | None = None

    @property
    def putting_off(self) -> bool:
        """True while an I runs: weight gradients wait. During a B they are computed at once."""
        return self._key is not None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Run one step: at its end every weight gradient must have been computed; after an error none is left."""
        assert not self._waiting, "the step before left weight gradients behind"
        self.open = True
        try:
            yield
            assert not self._waiting, f"weight gradients of {list(self._waiting)} were never computed"
        finally:
            self.open = False
            self._waiting.clear()

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Let the linears inside compute their weight gradients in the backward pass, as outside of a step."""
        before, self.open = self.open, False
        try:
            yield
        finally:
            self.open = before

    @contextmanager
    def put_off(self, key: Hashable) -> Iterator[None]:
        """Let weight gradients of the backward inside wait until `run(key)`."""
        assert key not in self._waiting, f"{key} runs its backward twice"
        self._key, self._waiting[key] = key, deque()
        try:
            yield
        finally:
            self._key = None

    def put(self, run: Callable[..., None], *keeps: Tensor) -> None:
        """Let `run` wait for its W, when it is called with the tensors of `keeps`."""
        if self.on_put is not None:
            self.on_put(keeps)
        self._waiting[self._key].append(Work(run, keeps))

    def held(self, key: Hashable) -> int | None:
        """Return the bytes of tensors that wait under `key`, each storage once; None where a module keeps its own."""
        if not all(work.keeps for work in self._waiting[key]):
            return None
        tensors = (tensor for work in self._waiting[key] for tensor in work.keeps)
        storages = {storage.data_ptr(): storage.nbytes() for storage in map(Tensor.untyped_storage, tensors)}
        return sum(storages.values())

    def run(self, key: Hashable) -> None:
        """Compute what waits under `key`, oldest first; each entry's tensors are freed as soon as it is done."""
        waiting = self._waiting.pop(key)
        with no_grad():
            while waiting:
                waiting.popleft()()


def weight_gradient(given: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient of a linear's weight from its input and its output's gradient, all tokens in one product."""
    # s b o -> (s b) o
    return gradient.reshape(-1, gradient.shape[-1]).t().matmul(given.reshape(-1, given.shape[-1]))


def accumulate(weight: Tensor, gradient: Tensor) -> None:
    """Add to the weight's gradient where autograd and Megatron's hook would have: `main_grad` if it has one."""
    total = getattr(weight, "main_grad", None)
    if total is not None:
        total.add_(gradient)
    elif weight.grad is None:
        weight.grad = gradient
    else:
        weight.grad.add_(gradient)
