"""Protocols of context-parallel algorithms: the two passes, and the parts that an algorithm offers to another one.

A module with these functions satisfies them, and so does an object with these methods.
"""

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_cp.context.heads import HeadExchange
    from megatron_cp.context.merge import SoftmaxMerge, Sum
    from megatron_cp.context.task import Saved, Task


@runtime_checkable
class Loop[S](Protocol):
    """One algorithm; S is the type of what its backward pass needs: a tuple of tensors or of such tuples."""

    def forward(self, q: "Tensor", k: "Tensor", v: "Tensor", task: "Task") -> "tuple[Tensor, S]":
        """Attend: q [s b h d], k and v [s b g d] of this rank -> out [s b h d]; all ranks call it together."""
        ...

    def backward(self, dout: "Tensor", saved: S, task: "Task") -> "tuple[Tensor, ...]":
        """Differentiate: dout [s b h d] -> dq [s b h d], dk and dv [s b g d]; all ranks call it together.

        A loop that merges sinks itself adds the gradient of `task.sink` to these where there is one.
        """
        ...


@runtime_checkable
class HeadParallel(Protocol):
    """An algorithm that exchanges heads for tokens and runs Ring Attention between the two exchanges."""

    def split(self, task: "Task") -> "tuple[HeadExchange, Task]":
        """Return the exchange, and the task of the ring between the two."""
        ...


@runtime_checkable
class Accumulating(Protocol):
    """An algorithm that adds its results to sums of the caller, which rounds them when all keys have been seen."""

    def attend_around(self, merge: "SoftmaxMerge", q: "Tensor", k: "Tensor", v: "Tensor", task: "Task") -> None:
        """Merge attention of q over the keys of all ranks."""
        ...

    def attend_around_backward(
        self, dq: "Sum", dk: "Sum", dv: "Sum", dout: "Tensor", saved: "Saved", task: "Task"
    ) -> None:
        """Add the gradients of `attend_around`; out and lse of `saved` are those of all keys."""
        ...
