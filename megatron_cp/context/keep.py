"""Attention that a recomputation does not repeat: its forward keeps (out, lse), by which the backward pass runs.

A checkpoint runs a function twice, first without gradients and then, in the backward pass, with them. The first run
keeps the results of its attention calls in their order; in the second run each call takes its own, with the q, k and v
that were computed again, and neither computes nor sends anything.

Kept are tensors of the loop's `Saved` that are not the caller's own q, k and v: out and lse, and q, k and v where the
loop has exchanged their tokens or heads, because exchanging them again would be communication.

Source: Li et al. 2023, DISTFLASHATTN, arXiv:2310.03294, section 3.3.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten


class KeptCall(NamedTuple):
    """One attention call: its result, and what its backward pass needs.

    call:  of the forward, as its backward pass takes it
    held:  for whose backward pass autograd saves the result, and after it the kept tensors, so that hooks see them
    saved: places of the loop's tensors among these, or ~n for the n-th of q, k and v
    """

    call: Any
    held: Tensor
    saved: list[int]
    saved_as: TreeSpec

    def results(self, given: Sequence[Tensor]) -> tuple[Tensor, Any]:
        """Return the result, and what the loop saved, with these q, k and v in the place of the forward's own."""
        kept = self.held.grad_fn.saved_tensors  # type: ignore[union-attr]
        leaves = [given[~place] if place < 0 else kept[place] for place in self.saved]
        return kept[0], tree_unflatten(leaves, self.saved_as)


class _SavedByAutograd(torch.autograd.Function):
    """A function of tensors that only saves them."""

    @staticmethod
    def forward(ctx: Any, root: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return root.new_empty(0)


class _Store:
    """The kept calls of one checkpointed function; `calls` is None before its forward and after its recomputation."""

    def __init__(self) -> None:
        self.calls: deque[KeptCall] | None = None
        self.reads = False


_open: ContextVar[_Store | None] = ContextVar("kept attention", default=None)


def keeping(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` for a reentrant checkpoint, which then repeats no attention: checkpoint(keeping(f), False, x).

    That is Megatron's checkpoint, and torch.utils.checkpoint with use_reentrant=True. Any other call of the result runs
    as a call of `function` does, and so does a checkpoint inside another one that keeps.
    """
    if not torch.is_grad_enabled() or _open.get() is not None:
        return function
    store = _Store()

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _opened(store):
            return function(*args, **kwargs)

    return run


@contextmanager
def _opened(store: _Store) -> Iterator[None]:
    store.reads = torch.is_grad_enabled()
    if store.reads and store.calls is None:
        # no checkpoint's: there was no run without gradients
        yield
        return
    if not store.reads:
        store.calls = deque()
    before = _open.set(store)
    try:
        yield
    finally:
        _open.reset(before)
        left, store.calls = store.calls, None if store.reads else store.calls
    assert not (store.reads and left), f"a recomputation has made {len(left or ())} attention calls less"


def take() -> KeptCall | None:
    """Return what the forward kept of this call of a recomputation; None outside of one."""
    store = _open.get()
    if store is None or not store.reads:
        return None
    assert store.calls, "a recomputation makes an attention call that its forward did not make"
    return store.calls.popleft()


def keep(call: Any, result: Tensor, saved: Any, given: Sequence[Tensor]) -> None:
    """Keep a call of a checkpoint's forward: its result, and what the loop saved, but for the caller's own q, k and v.

    Nothing is kept outside of such a forward.
    """
    store = _open.get()
    if store is None or store.calls is None:
        return
    leaves, saved_as = tree_flatten(saved)
    kept, places = [result.detach()], list[int]()
    for leaf in leaves:
        places.append(_place(leaf, result, given, len(kept)))
        if places[-1] == len(kept):
            kept.append(_alone(leaf, given))
    with torch.enable_grad():
        held = _SavedByAutograd.apply(torch.zeros(0, requires_grad=True), *kept)
    store.calls.append(KeptCall(call, held, places, saved_as))


def _place(leaf: Tensor, result: Tensor, given: Sequence[Tensor], free: int) -> int:
    """Return where a tensor of the loop is found: ~n among q, k and v, 0 for the result, else the next free place."""
    if _same(leaf, result):
        return 0
    return next((~at for at, x in enumerate(given) if _same(leaf, x)), free)


def _same(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    form = a.untyped_storage()._cdata, a.storage_offset(), a.shape, a.stride(), a.dtype
    return form == (b.untyped_storage()._cdata, b.storage_offset(), b.shape, b.stride(), b.dtype)


def _alone(leaf: Tensor, given: Sequence[Tensor]) -> Tensor:
    """Return a tensor that keeps no memory of q, k and v alive, which a recomputation makes again."""
    shared = any(leaf.untyped_storage()._cdata == x.untyped_storage()._cdata for x in given)
    return leaf.clone() if shared else leaf.detach()
