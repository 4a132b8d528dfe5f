"""What a backend's loop is given."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from megatron_cp.comm import Fabric
from megatron_cp.context.layouts import Layout, Runs
from megatron_cp.context.merge import SoftmaxMerge, Sum
from megatron_cp.context.tiles import tiles
from megatron_cp.grid import Grid
from megatron_cp.kernels import Kernel


class Saved(NamedTuple):
    """What the backward pass needs of the forward pass, in the layout of the innermost loop."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor


class Axes(NamedTuple):
    """The context-parallel group as a grid: one axis exchanges heads for tokens, the other is a ring."""

    grid: Grid
    inner: Fabric
    outer: Fabric
    heads: str

    @property
    def ring(self) -> str:
        return "outer" if self.heads == "inner" else "inner"

    def fabric(self, axis: str) -> Fabric:
        return self.inner if axis == "inner" else self.outer


@dataclass(frozen=True)
class Task:
    """One attention over tokens sharded on the ranks of a fabric.

    runs:   positions of each rank's tokens, in sequence order on each rank
    scale:  factor of the scores
    heads:  query and KV heads on each rank, before any exchange
    axes:   the same ranks as a grid, for backends that use two axes
    """

    fabric: Fabric
    runs: Layout
    causal: bool
    scale: float
    kernel: Kernel
    heads: tuple[int, int]
    axes: Axes | None = None

    @property
    def mine(self) -> Runs:
        return self.runs[self.fabric.rank]

    def on(self, fabric: Fabric, runs: Layout, kernel: Kernel) -> "Task":
        """The same attention over other ranks, positions and heads."""
        return replace(self, fabric=fabric, runs=runs, kernel=kernel)

    def attend(self, merge: SoftmaxMerge, q: Tensor, k: Tensor, v: Tensor, keys: Runs) -> None:
        """Merge attention of this rank's queries over a block of keys whose leading tokens are k and v."""
        for rows, cols, causal in tiles(self.mine, keys, self.causal):
            out, lse = self.kernel.forward(q[rows], k[cols], v[cols], scale=self.scale, causal=causal)
            merge.add(rows, out, lse)

    def attend_backward(
        self, dq: Sum, dk: Sum, dv: Sum, dout: Tensor, k: Tensor, v: Tensor, saved: Saved, keys: Runs
    ) -> None:
        """Add this rank's queries' part of the gradients of q and of a block of keys."""
        q, out, lse = saved.q, saved.out, saved.lse
        for rows, cols, causal in tiles(self.mine, keys, self.causal):
            parts = self.kernel.backward(
                dout[rows], q[rows], k[cols], v[cols], out[rows], lse[rows], scale=self.scale, causal=causal
            )
            for total, where, part in zip((dq, dk, dv), (rows, cols, cols), parts, strict=True):
                total.add(where, part)
