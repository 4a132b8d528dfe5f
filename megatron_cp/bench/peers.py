"""Compare with the ring attention of other libraries: ring-flash-attn and yunchang (extra `peers`).

Both import flash-attn's low-level functions when they are imported themselves. Where that package is missing, as on
every CPU, `flash_attn_modules` offers them the same signatures, backed by the kernel of the comparison.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module, metadata
from types import ModuleType
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_cp.bench.comparison import HALF_PRECISION, RefusedError
from megatron_cp.context.layouts import STRIPED, ZIGZAG
from megatron_cp.kernels import Kernel


@dataclass(frozen=True)
class Peer:
    """A function `f(q, k, v, causal=, group=)` of another library over `b s h d`, and the layout that it expects."""

    name: str
    package: str
    module: str
    function: str
    layout: str


PEERS = (
    Peer("ring-flash-attn zigzag", "ring-flash-attn", "ring_flash_attn", "zigzag_ring_flash_attn_func", ZIGZAG),
    Peer("ring-flash-attn stripe", "ring-flash-attn", "ring_flash_attn", "stripe_flash_attn_func", STRIPED),
    Peer("ring-flash-attn ring", "ring-flash-attn", "ring_flash_attn", "ring_flash_attn_func", "contiguous"),
    Peer("yunchang zigzag", "yunchang", "yunchang.ring", "zigzag_ring_flash_attn_func", ZIGZAG),
    Peer("yunchang stripe", "yunchang", "yunchang.ring", "stripe_flash_attn_func", STRIPED),
    Peer("yunchang ring", "yunchang", "yunchang.ring", "ring_flash_attn_func", "contiguous"),
)


def installed() -> list[Peer]:
    """Return the peers whose packages are installed; raises RuntimeError when none is."""
    found = [peer for peer in PEERS if _version(peer.package)]
    if not found:
        raise RuntimeError("no peer is installed; pip install 'megatron-cp[peers]'")
    return found


def load(peer: Peer, kernel: Kernel) -> Callable[..., Tensor]:
    """Return the peer's function over `s b h d`: attend(q, k, v, causal, group)."""
    with importable({**flash_attn_modules(kernel), "ring_flash_attn.adapters": _adapters()}):
        function = getattr(import_module(peer.module), peer.function)

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, group: Any) -> Tensor:
        if q.dtype not in HALF_PRECISION:
            # what they add up in float32 is then no copy of the buffer that each tile is written to
            raise RefusedError(f"it works in bfloat16 and float16 only, got {q.dtype}; give --dtype bfloat16")
        # s b h d -> b s h d and back; contiguous, because the peers send these tensors as they are
        q, k, v = (x.transpose(0, 1).contiguous() for x in (q, k, v))
        return function(q, k, v, causal=causal, group=group).transpose(0, 1)

    return attend


@contextmanager
def counted() -> Iterator[list[int]]:
    """Collect the bytes of each message that this process sends through torch's batched point-to-point calls."""
    sizes: list[int] = []
    original = dist.batch_isend_irecv

    def counting(operations: list[dist.P2POp]) -> Any:
        sizes.extend(op.tensor.numel() * op.tensor.element_size() for op in operations if op.op is dist.isend)
        return original(operations)

    dist.batch_isend_irecv = counting  # type: ignore[assignment]
    try:
        yield sizes
    finally:
        dist.batch_isend_irecv = original


@contextmanager
def importable(modules: Mapping[str, ModuleType]) -> Iterator[None]:
    """Let imports inside the block find `modules`, except those already imported; sys.modules is restored at its end.

    This is the one place that touches sys.modules: the peers import packages that this machine lacks, and read the
    functions they need while they are imported.
    """
    added = {name: module for name, module in modules.items() if name not in sys.modules}
    sys.modules |= added
    try:
        yield
    finally:
        for name in added:
            sys.modules.pop(name, None)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def flash_attn_modules(kernel: Kernel) -> dict[str, ModuleType]:
    """Return modules with flash-attn's low-level functions, computed by `kernel`; none where it is installed."""
    if "flash_attn" in sys.modules or importlib.util.find_spec("flash_attn") is not None:
        return {}
    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")

    def _flash_attn_forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int = -1,
        window_size_right: int = -1,
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        return_softmax: bool = False,
    ) -> tuple[Tensor, Tensor, None, None]:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        out, lse = kernel.forward(q, k, v, scale=softmax_scale, causal=causal)
        # flash_attn returns out in the queries' dtype
        return out.to(q.dtype).transpose(0, 1), lse.permute(1, 2, 0), None, None

    def _flash_attn_backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int = -1,
        window_size_right: int = -1,
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        rng_state: Tensor | None = None,
    ) -> None:
        dout, q, k, v, out = (x.transpose(0, 1) for x in (dout, q, k, v, out))
        gradients = kernel.backward(
            dout, q, k, v, out, softmax_lse.permute(2, 0, 1), scale=softmax_scale, causal=causal
        )
        for given, gradient in zip((dq, dk, dv), gradients, strict=True):
            given.copy_(gradient.transpose(0, 1))

    interface._flash_attn_forward = _flash_attn_forward  # type: ignore[attr-defined]
    interface._flash_attn_backward = _flash_attn_backward  # type: ignore[attr-defined]
    interface._flash_attn_varlen_forward = _refused  # type: ignore[attr-defined]
    interface._flash_attn_varlen_backward = _refused  # type: ignore[attr-defined]
    package.flash_attn_interface = interface  # type: ignore[attr-defined]
    package.flash_attn_func = _refused  # type: ignore[attr-defined]
    package.__version__ = "2.7.4"  # type: ignore[attr-defined]
    return {"flash_attn": package, "flash_attn.flash_attn_interface": interface}


def _adapters() -> ModuleType:
    """Return an empty stand-in for ring-flash-attn's adapters, which need a transformers release of their time."""
    module = ModuleType("ring_flash_attn.adapters")
    module.substitute_hf_flash_attn = module.update_ring_flash_attn_params = _refused  # type: ignore[attr-defined]
    return module


def _refused(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("this part of the library is not compared")
