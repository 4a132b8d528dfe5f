"""Attention on one device: what every backend computes through, and what a kernel may rely on."""

from typing import TYPE_CHECKING, Protocol, TypeGuard, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

Window = tuple[int | None, int | None]
"""(left, right): of s queries and t keys query i sees the keys from i + t - s - left to i + t - s + right, so that the
last query has the position of the last key, as in flash-attn since 2.1; None is no limit. There are no more queries
than keys, and every query sees a key."""


@runtime_checkable
class Kernel(Protocol):
    """Softmax attention of one tile; knows nothing of ranks.

    q is `s b h d`, k and v are `s b g d` with h a multiple of g, out and dout are `s b h d`, lse is `s b h`: the
    natural-log logsumexp of the scaled scores in float32 (float64 for float64). Inputs may be strided views with a
    contiguous last dim and are never empty. `causal` asks for equally many queries and keys. out and the gradients
    come back in q's dtype or, where the op computes wider, in lse's, not rounded before they are added up; maybe as
    strided views. A row without any key has out 0 and lse -inf.
    """

    @property
    def name(self) -> str:
        """Name in the registry of kernels."""
        ...

    def forward(
        self, q: "Tensor", k: "Tensor", v: "Tensor", *, scale: float, causal: bool
    ) -> tuple["Tensor", "Tensor"]:
        """Return out and lse of this tile."""
        ...

    def backward(
        self,
        dout: "Tensor",
        q: "Tensor",
        k: "Tensor",
        v: "Tensor",
        out: "Tensor",
        lse: "Tensor",
        *,
        scale: float,
        causal: bool,
    ) -> tuple["Tensor", "Tensor", "Tensor"]:
        """Return (dq, dk, dv) of this tile; out (in q's dtype or lse's) and lse belong to the whole, merged softmax."""
        ...


@runtime_checkable
class PreparesBackward(Protocol):
    """A kernel that prepares something once for all tiles of an attention's backward pass."""

    def for_backward(self) -> Kernel:
        """Return the kernel for one backward pass."""
        ...


@runtime_checkable
class CapsScores(Protocol):
    """A kernel that can cap scores: softcap tanh(score / softcap) takes the place of each scaled score, also in lse."""

    def capped(self, softcap: float) -> Kernel:
        """Return the kernel that caps scores at `softcap`, a positive number."""
        ...


@runtime_checkable
class DropsWeights(Protocol):
    """A kernel that can drop weights, by columns of q and k that `megatron_cp.kernels.dropout` describes.

    lse stays that of all weights, so that results are merged as without, and the columns get gradients of 0.
    """

    def dropping(self, rate: float) -> Kernel:
        """Return the kernel that drops this part of the weights, above 0 and below 1."""
        ...


class WindowKernel(Kernel, Protocol):
    """A kernel that computes a band along the diagonal in one call; where `windows` is False it is any other kernel."""

    @property
    def windows(self) -> bool:
        """True if `forward` and `backward` take a window."""
        ...

    def forward(
        self, q: "Tensor", k: "Tensor", v: "Tensor", *, scale: float, causal: bool, window: Window | None = None
    ) -> tuple["Tensor", "Tensor"]:
        """Return out and lse of this tile; `causal` is False where a window is given."""
        ...

    def backward(
        self,
        dout: "Tensor",
        q: "Tensor",
        k: "Tensor",
        v: "Tensor",
        out: "Tensor",
        lse: "Tensor",
        *,
        scale: float,
        causal: bool,
        window: Window | None = None,
    ) -> tuple["Tensor", "Tensor", "Tensor"]:
        """Return (dq, dk, dv) of this tile."""
        ...


def takes_windows(kernel: Kernel) -> TypeGuard[WindowKernel]:
    """Return True if this kernel computes windows; a kernel that does not say so takes full and causal tiles only."""
    return getattr(kernel, "windows", False)


def check_call(q: "Tensor", k: "Tensor", v: "Tensor", causal: bool, window: Window | None = None) -> None:
    """Assert what a kernel may rely on; some fused ops kill the process or answer wrongly instead of saying so."""
    assert q.ndim == k.ndim == v.ndim == 4, "attention tensors are s b h d"
    assert q.dtype == k.dtype == v.dtype, f"q, k and v differ in dtype: {q.dtype}, {k.dtype}, {v.dtype}"
    assert all(x.numel() for x in (q, k, v)), "an empty tile never reaches a kernel"
    assert k.shape[:3] == v.shape[:3], f"k {tuple(k.shape)} and v {tuple(v.shape)} are of different tokens or heads"
    assert q.shape[1::2] == k.shape[1::2], f"q {tuple(q.shape)} and k {tuple(k.shape)} differ in batch or head dim"
    assert q.shape[2] % k.shape[2] == 0, f"{q.shape[2]} query heads are no multiple of {k.shape[2]} key heads"
    # with it no row is without keys, and top-left and bottom-right causal are the same
    assert not causal or q.shape[0] == k.shape[0], "a causal tile has as many queries as keys"
    if window is not None:
        # ops read a negative limit as none, and one of more than all keys too
        assert not causal, "a window says itself what is causal"
        assert all(limit is None or limit >= 0 for limit in window), f"a window's limits are not negative: {window}"
        assert q.shape[0] <= k.shape[0], "a window has no more queries than keys"
    assert q.stride(3) == k.stride(3) == v.stride(3) == 1, "the last dim is contiguous"


def check_backward(dout: "Tensor", q: "Tensor", v: "Tensor", out: "Tensor", lse: "Tensor") -> None:
    """Assert that what backward gets from outside fits the tile."""
    shape = (*q.shape[:3], v.shape[3])
    assert dout.shape == out.shape == shape, f"dout {tuple(dout.shape)}, out {tuple(out.shape)}, expected {shape}"
    assert lse.shape == q.shape[:3], f"lse {tuple(lse.shape)}, expected {tuple(q.shape[:3])}"
    assert dout.dtype == q.dtype, f"dout is {dout.dtype}, q {q.dtype}"
    assert out.dtype in (q.dtype, lse.dtype), f"out is {out.dtype}, q {q.dtype}, lse {lse.dtype}"
