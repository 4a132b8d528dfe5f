"""Registry of kernels: attention on one device. Pure: a kernel's module is imported with its first use."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from megatron_cp.errors import CannotRun, Refused
from megatron_cp.kernels.protocol import CapsScores, DropsWeights, Kernel, Window, takes_windows
from megatron_cp.registry import Registry

__all__ = [
    "AUTO",
    "KERNELS",
    "Kernel",
    "KernelEntry",
    "Window",
    "check_caps",
    "check_drops",
    "choose",
    "takes_windows",
    "with_cap",
    "with_dropout",
]


@dataclass(frozen=True)
class KernelEntry:
    """A kernel entry. The module that `load` imports defines create(), refusal() and missing().

    caps:    its kernel can cap scores
    drops:   its kernel can drop weights
    to_drop: `auto` takes it for that alone
    """

    name: str
    aliases: tuple[str, ...]
    load: Callable[[], ModuleType]
    needs: str
    summary: str
    caps: bool = False
    drops: bool = False
    to_drop: bool = False


def _torch_sdpa() -> ModuleType:
    from megatron_cp.kernels import torch_sdpa

    return torch_sdpa


def _flash_attn() -> ModuleType:
    from megatron_cp.kernels import flash_attn

    return flash_attn


def _flash_attn_3() -> ModuleType:
    from megatron_cp.kernels import flash_attn_3

    return flash_attn_3


def _flash_attn_4() -> ModuleType:
    from megatron_cp.kernels import flash_attn_4

    return flash_attn_4


def _transformer_engine() -> ModuleType:
    from megatron_cp.kernels import transformer_engine

    return transformer_engine


def _triton() -> ModuleType:
    from megatron_cp.kernels import triton_flash

    return triton_flash


def _reference() -> ModuleType:
    from megatron_cp.kernels import reference

    return reference


# in the order in which `auto` asks them where none was measured
KERNELS: Registry[KernelEntry] = Registry(
    "kernel",
    [
        KernelEntry(
            "torch",
            ("sdpa",),
            _torch_sdpa,
            "torch; on CUDA Ampere or later and float16 or bfloat16",
            "torch's fused ops: CPU flash; on CUDA flash or cuDNN, measured per shape",
        ),
        KernelEntry(
            "flash",
            ("flash-attn",),
            _flash_attn,
            "CUDA and the flash-attn package 2.6 to 2.8",
            "the flash-attn package's FlashAttention-2",
            caps=True,
        ),
        KernelEntry(
            "flash-3",
            ("flash-attn-3", "fa3"),
            _flash_attn_3,
            "a Hopper GPU and FlashAttention-3, built from the flash-attention repository",
            "FlashAttention-3's interface",
        ),
        KernelEntry(
            "flash-4",
            ("flash-attn-4", "fa4"),
            _flash_attn_4,
            "a Hopper or Blackwell GPU, head dims up to 128, and the flash-attn-4 package 4.0.0b36",
            "the flash-attn-4 package's kernels in CuTe",
        ),
        KernelEntry(
            "te",
            ("transformer-engine",),
            _transformer_engine,
            "CUDA, head dims up to 128, and TransformerEngine 2.15 to 2.20",
            "TransformerEngine's fused attention (cuDNN), dense tiles in half precision",
        ),
        KernelEntry(
            "triton",
            (),
            _triton,
            "an Ampere GPU or a later one, head dims up to 256, and triton, which comes with torch for CUDA",
            "flash attention of this project, which drops weights; auto takes it for that alone",
            drops=True,
            to_drop=True,
        ),
        KernelEntry(
            "reference",
            ("dense",),
            _reference,
            "torch; memory grows with the square of the tile",
            "dense attention written out: any device, any floating dtype, the oracle of the tests",
            caps=True,
            drops=True,
        ),
    ],
    group="megatron_cp.kernels",
)

AUTO = "auto"


def choose(
    name: str,
    *,
    device: str,
    dtype: str,
    head_dim: int,
    deterministic: bool = False,
    softcap: float | None = None,
    drops: bool = False,
) -> tuple[Kernel, str]:
    """Return the kernel called `name` (or the first able one for `auto`) and one sentence that says why it is this one.

    device is `cpu` or `cuda` (an index may follow), dtype a torch dtype's name without `torch.`, head_dim the larger
    of the key's and the value's. With `deterministic` the gradients of two equal calls are equal bit for bit.
    With `softcap` the kernel caps scores there; with `drops` it is one that can drop weights.
    Raises ValueError for an unknown name or one that cannot run this, RuntimeError when its package is missing.
    """
    device, dtype = device.split(":")[0], dtype.removeprefix("torch.")
    if name != AUTO:
        if drops:
            check_drops(name)
        kernel, reason = _named(KERNELS.get(name), device, dtype, head_dim, deterministic)
        return with_cap(kernel, softcap), reason
    refusals: list[str] = []
    order, basis = _order(device)
    for entry in order:
        if softcap is not None and not entry.caps:
            refusals.append(f"{entry.name!r} does not cap scores")
            continue
        if drops and not entry.drops:
            refusals.append(f"{entry.name!r} does not drop weights")
            continue
        if entry.to_drop and not drops:
            continue
        module = entry.load()
        why_not = module.refusal(device=device, dtype=dtype, head_dim=head_dim) or module.missing(device=device)
        if why_not is None:
            kernel = with_cap(module.create(device=device, deterministic=deterministic), softcap)
            return kernel, _reason(entry, device, dtype, head_dim, [*refusals, *basis])
        refusals.append(f"{entry.name!r} {why_not}")
    raise AssertionError("the last kernel of the registry runs everything")


def with_cap(kernel: Kernel, softcap: float | None) -> Kernel:
    """Return the kernel with scores capped at `softcap`; raises ValueError for one that does not cap them."""
    if softcap is None:
        return kernel
    check_caps(kernel)
    assert isinstance(kernel, CapsScores), "checked above"
    return kernel.capped(softcap)


def check_caps(kernel: str | Kernel) -> None:
    """Raise ValueError for a kernel, or the name of one, that does not cap scores."""
    _check_does(kernel, CapsScores, lambda entry: entry.caps, "cap scores", "softcap")


def with_dropout(kernel: Kernel, rate: float) -> Kernel:
    """Return the kernel that drops weights at this rate; raises ValueError for one that does not."""
    if not rate:
        return kernel
    check_drops(kernel)
    assert isinstance(kernel, DropsWeights), "checked above"
    return kernel.dropping(rate)


def check_drops(kernel: str | Kernel) -> None:
    """Raise ValueError for a kernel, or the name of one, that does not drop weights."""
    _check_does(kernel, DropsWeights, lambda entry: entry.drops, "drop weights", "dropout")


def _check_does(
    kernel: str | Kernel, protocol: type, does: Callable[[KernelEntry], bool], what: str, argument: str
) -> None:
    named = kernel if isinstance(kernel, str) else kernel.name
    if isinstance(kernel, protocol) or named == AUTO or (isinstance(kernel, str) and does(KERNELS.get(kernel))):
        return
    names = ", ".join(entry.name for entry in KERNELS if does(entry))
    raise Refused(f"kernel {named!r} does not {what}; use 'auto' or one of: {names}, or leave {argument} out")


def _order(device: str) -> tuple[list[KernelEntry], list[str]]:
    """Return the kernels in the order in which `auto` asks them, and on which figures this order rests."""
    if device != "cuda":
        return [*KERNELS], []
    from megatron_cp.kernels.measured import basis, measured

    entry = measured(device)
    first = [KERNELS.get(name) for name in entry.order] if entry else []
    return [*first, *(other for other in KERNELS if other not in first)], [basis(device)] if basis(device) else []


def _named(entry: KernelEntry, device: str, dtype: str, head_dim: int, deterministic: bool) -> tuple[Kernel, str]:
    module = entry.load()
    way_out = f"use 'auto' or one of: {', '.join(KERNELS.names)}"
    if why_not := module.refusal(device=device, dtype=dtype, head_dim=head_dim):
        raise Refused(f"kernel {entry.name!r} {why_not}; {way_out}")
    if why_not := module.missing(device=device):
        raise CannotRun(f"kernel {entry.name!r} {why_not}; {way_out}")
    return module.create(device=device, deterministic=deterministic), f"{entry.name!r} was asked for by name"


def _reason(entry: KernelEntry, device: str, dtype: str, head_dim: int, refusals: list[str]) -> str:
    chosen = f"auto chose {entry.name!r} for {dtype} with head dim {head_dim} on {device}"
    return f"{chosen}: {'; '.join(refusals or [entry.summary])}"
