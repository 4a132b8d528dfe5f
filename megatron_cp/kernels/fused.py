"""The adapter around every fused op: `s b h d` to the op's layout and back without a copy."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from megatron_cp.kernels.protocol import Window, check_backward, check_call

type Gradients = tuple[Tensor, Tensor, Tensor]


class Op(NamedTuple):
    """A fused op in `b h s d` with lse `b h s`, where `s b h d` tensors arrive as permuted views.

    forward(q, k, v, scale, causal) -> (out, lse); backward(dout, q, k, v, out, lse, scale, causal) -> (dq, dk, dv).
    windows: both take a window as one more argument
    """

    name: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Gradients]
    windows: bool = False


class Shape(NamedTuple):
    """The sizes that decide which op is fastest; lengths in tokens."""

    direction: str
    dtype: torch.dtype
    queries: int
    keys: int
    batch: int
    heads: int
    groups: int
    head_dim: int
    causal: bool
    window: Window | None = None

    def __str__(self) -> str:
        mask, dtype = "causal" if self.causal else "full", str(self.dtype).removeprefix("torch.")
        if self.window is not None:
            mask = f"window {self.window}"
        heads = f"h={self.heads} g={self.groups} d={self.head_dim}"
        return f"{self.direction} {self.queries}x{self.keys} b={self.batch} {heads} {mask} {dtype}"


class Picker(Protocol):
    """Says which op runs a call of this shape; may try ops out with `call(op)`.

    windows: it has an op that takes windows, and picks it for a shape with one
    """

    @property
    def windows(self) -> bool: ...

    def pick(self, shape: Shape, device: torch.device, call: Callable[[Op], tuple[Tensor, ...]]) -> Op: ...

    def report(self) -> list[str]: ...


class Only(NamedTuple):
    """The picker of one op."""

    op: Op

    @property
    def windows(self) -> bool:
        return self.op.windows

    def pick(self, shape: Shape, device: torch.device, call: Callable[[Op], tuple[Tensor, ...]]) -> Op:
        return self.op

    def report(self) -> list[str]:
        return []


class PreparedRows:
    """lse as the ops' backward passes read it, made once for all tiles of the same queries."""

    MOST = 4
    """Sets of rows that are kept: a ring alternates between all rows and half of them."""

    def __init__(self) -> None:
        self._kept: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

    def prepare(self, lse: Float[Tensor, "s b h"]) -> Float[Tensor, "b h s"]:
        """Return lse with inf in rows without keys, as exp(score - lse) must vanish there; contiguous on a GPU."""
        key = lse.untyped_storage()._cdata, lse.storage_offset(), lse.shape, lse.stride()
        if key not in self._kept:
            prepared = lse.masked_fill(lse == float("-inf"), float("inf")).permute(1, 2, 0)
            # CUDA's ops read it through a bare pointer
            prepared = prepared.contiguous() if lse.is_cuda else prepared
            while len(self._kept) >= self.MOST:
                del self._kept[next(iter(self._kept))]
            # lse is kept too, so that no other tensor comes to lie where it does
            self._kept[key] = lse, prepared
        return self._kept[key][1]


class FusedKernel:
    """A kernel that never holds the score matrix; `picker` chooses its op call by call.

    multiple: heads are padded to a multiple of it on CUDA
    """

    def __init__(self, name: str, picker: Picker, rows: PreparedRows | None = None, *, multiple: int = 8) -> None:
        self.name = name
        self.picker = picker
        self.windows = picker.windows
        self._rows, self._multiple = rows, multiple

    def for_backward(self) -> "FusedKernel":
        """Return this kernel for the backward pass of one attention, whose lse stays as it is."""
        return FusedKernel(self.name, self.picker, PreparedRows(), multiple=self._multiple)

    def forward(
        self,
        q: Float[Tensor, "s b h d"],
        k: Float[Tensor, "t b g d"],
        v: Float[Tensor, "t b g dv"],
        *,
        scale: float,
        causal: bool,
        window: Window | None = None,
    ) -> tuple[Float[Tensor, "s b h dv"], Float[Tensor, "s b h"]]:
        """out and lse as views of what the op wrote; a value head dim unlike the key's is padded with zeros."""
        check_call(q, k, v, causal, window)
        q_, k_, v_ = _op_inputs(self._width(q, v), q, k, v)
        how = (scale, causal) if window is None else (scale, causal, window)

        def call(op: Op) -> tuple[Tensor, ...]:
            return op.forward(q_, k_, v_, *how)

        op = self.picker.pick(_shape("forward", q, k, causal, window), q.device, call)
        out, lse = op.forward(q_, k_, v_, *how)
        return _from_op(out, v.shape[3]), lse.permute(2, 0, 1)

    def backward(
        self,
        dout: Float[Tensor, "s b h dv"],
        q: Float[Tensor, "s b h d"],
        k: Float[Tensor, "t b g d"],
        v: Float[Tensor, "t b g dv"],
        out: Float[Tensor, "s b h dv"],
        lse: Float[Tensor, "s b h"],
        *,
        scale: float,
        causal: bool,
        window: Window | None = None,
    ) -> tuple[Float[Tensor, "s b h d"], Float[Tensor, "t b g d"], Float[Tensor, "t b g dv"]]:
        """dq, dk, dv; rows with lse -inf (no key in the whole sequence) give no gradient."""
        check_call(q, k, v, causal, window)
        check_backward(dout, q, v, out, lse)
        dout_, q_, k_, v_, out_ = _op_inputs(self._width(q, v), dout, q, k, v, out.to(q.dtype))
        how = (scale, causal) if window is None else (scale, causal, window)
        lse_ = (self._rows or PreparedRows()).prepare(lse)

        def call(op: Op) -> Gradients:
            return op.backward(dout_, q_, k_, v_, out_, lse_, *how)

        dq, dk, dv = call(self.picker.pick(_shape("backward", q, k, causal, window), q.device, call))
        return _from_op(dq, q.shape[3]), _from_op(dk, q.shape[3]), _from_op(dv, v.shape[3])

    def _width(self, q: Tensor, v: Tensor) -> int:
        # the ops want equal head dims, the CUDA ones multiples of 8 or more
        widest = max(q.shape[3], v.shape[3])
        return -(-widest // self._multiple) * self._multiple if q.is_cuda else widest

    def report(self) -> list[str]:
        """One line for every shape whose op was chosen by measuring: the op and why it is that one."""
        return self.picker.report()


def _shape(direction: str, q: Tensor, k: Tensor, causal: bool, window: Window | None) -> Shape:
    queries, batch, heads, head_dim = q.shape
    return Shape(direction, q.dtype, queries, k.shape[0], batch, heads, k.shape[2], head_dim, causal, window)


def _op_inputs(width: int, *tensors: Tensor) -> list[Tensor]:
    # s b h d -> b h s d, zeros behind d where the op needs a wider one: they change neither scores nor outputs
    padded = (x if x.shape[3] == width else functional.pad(x, (0, width - x.shape[3])) for x in tensors)
    return [x.permute(1, 2, 0, 3) for x in padded]


def _from_op(x: Tensor, width: int) -> Tensor:
    # b h s d -> s b h d
    return x.permute(2, 0, 1, 3)[..., :width]
