"""Attention on one device: the seam every backend computes through, and the menu of what fulfils it."""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from megatron_cp.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor


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
    def name(self) -> str: ...

    def forward(
        self, q: "Tensor", k: "Tensor", v: "Tensor", *, scale: float, causal: bool
    ) -> tuple["Tensor", "Tensor"]: ...

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
        """(dq, dk, dv) of this tile; out (in q's dtype or lse's) and lse belong to the whole, merged softmax."""
        ...


@dataclass(frozen=True)
class KernelEntry:
    """One dish; `module` offers create, refusal (what it cannot do) and missing (what the machine lacks)."""

    name: str
    aliases: tuple[str, ...]
    module: str
    needs: str
    summary: str


# in the order in which `auto` asks them
KERNELS: Registry[KernelEntry] = Registry(
    "kernel",
    [
        KernelEntry(
            "torch",
            ("sdpa",),
            "megatron_cp.kernels.torch_sdpa",
            "torch; on CUDA Ampere or later and float16 or bfloat16",
            "torch's fused ops: CPU flash; on CUDA flash or cuDNN, measured per shape",
        ),
        KernelEntry(
            "flash",
            ("flash-attn",),
            "megatron_cp.kernels.flash_attn",
            "CUDA and the flash-attn package 2.6 or later",
            "the flash-attn package's FlashAttention-2",
        ),
        KernelEntry(
            "reference",
            ("dense",),
            "megatron_cp.kernels.reference",
            "torch; memory grows with the square of the tile",
            "dense attention written out: any device, any floating dtype, the oracle of the tests",
        ),
    ],
)

AUTO = "auto"


def choose(name: str, *, device: str, dtype: str, head_dim: int, deterministic: bool = False) -> tuple[Kernel, str]:
    """The kernel called `name` (or the first able one for `auto`) and one sentence that says why it is this one.

    device is `cpu` or `cuda` (an index may follow), dtype a torch dtype's name without `torch.`, head_dim the larger
    of the key's and the value's. With `deterministic` the gradients of two equal calls are equal bit for bit.
    Raises ValueError for an unknown name or one that cannot run this, RuntimeError when its package is missing.
    """
    device, dtype = device.split(":")[0], dtype.removeprefix("torch.")
    if name != AUTO:
        return _named(KERNELS.get(name), device, dtype, head_dim, deterministic)
    refusals: list[str] = []
    for entry in KERNELS:
        module = import_module(entry.module)
        why_not = module.refusal(device=device, dtype=dtype, head_dim=head_dim) or module.missing(device=device)
        if why_not is None:
            return module.create(deterministic=deterministic), _reason(entry, device, dtype, head_dim, refusals)
        refusals.append(f"{entry.name!r} {why_not}")
    raise AssertionError("the last kernel of the menu runs everything")


def _named(entry: KernelEntry, device: str, dtype: str, head_dim: int, deterministic: bool) -> tuple[Kernel, str]:
    module = import_module(entry.module)
    way_out = f"use 'auto' or one of: {', '.join(KERNELS.names)}"
    if why_not := module.refusal(device=device, dtype=dtype, head_dim=head_dim):
        raise ValueError(f"kernel {entry.name!r} {why_not}; {way_out}")
    if why_not := module.missing(device=device):
        raise RuntimeError(f"kernel {entry.name!r} {why_not}; {way_out}")
    return module.create(deterministic=deterministic), f"{entry.name!r} was asked for by name"


def _reason(entry: KernelEntry, device: str, dtype: str, head_dim: int, refusals: list[str]) -> str:
    chosen = f"auto chose {entry.name!r} for {dtype} with head dim {head_dim} on {device}"
    return f"{chosen}: {'; '.join(refusals or [entry.summary])}"


def check_call(q: "Tensor", k: "Tensor", v: "Tensor", causal: bool) -> None:
    """Assert what a kernel may rely on; some fused ops kill the process or answer wrongly instead of saying so."""
    assert q.ndim == k.ndim == v.ndim == 4, "attention tensors are s b h d"
    assert q.dtype == k.dtype == v.dtype, f"q, k and v differ in dtype: {q.dtype}, {k.dtype}, {v.dtype}"
    assert all(x.numel() for x in (q, k, v)), "an empty tile never reaches a kernel"
    assert k.shape[:3] == v.shape[:3], f"k {tuple(k.shape)} and v {tuple(v.shape)} are of different tokens or heads"
    assert q.shape[1::2] == k.shape[1::2], f"q {tuple(q.shape)} and k {tuple(k.shape)} differ in batch or head dim"
    assert q.shape[2] % k.shape[2] == 0, f"{q.shape[2]} query heads are no multiple of {k.shape[2]} key heads"
    # with it no row is without keys, and top-left and bottom-right causal are the same
    assert not causal or q.shape[0] == k.shape[0], "a causal tile has as many queries as keys"
    assert q.stride(3) == k.stride(3) == v.stride(3) == 1, "the last dim is contiguous"


def check_backward(dout: "Tensor", q: "Tensor", v: "Tensor", out: "Tensor", lse: "Tensor") -> None:
    """Assert that what backward gets from outside fits the tile."""
    shape = (*q.shape[:3], v.shape[3])
    assert dout.shape == out.shape == shape, f"dout {tuple(dout.shape)}, out {tuple(out.shape)}, expected {shape}"
    assert lse.shape == q.shape[:3], f"lse {tuple(lse.shape)}, expected {tuple(q.shape[:3])}"
    assert dout.dtype == q.dtype, f"dout is {dout.dtype}, q {q.dtype}"
    assert out.dtype in (q.dtype, lse.dtype), f"out is {out.dtype}, q {q.dtype}, lse {lse.dtype}"
