"""Refusals of tensors that attention does not take, whatever the algorithm; every rank of a call raises them alike."""

import torch
from torch import Tensor

from megatron_cp.dtypes import BYTES
from megatron_cp.errors import Refused

DTYPES = tuple(getattr(torch, name) for name in BYTES)


def check_inputs(q: object, k: object, v: object) -> None:
    """Raise Refused unless q [s b h d], k and v [s b g d] are tensors that can be attended."""
    for name, x in zip("qkv", (q, k, v), strict=True):
        _check_alone(name, x)
    assert isinstance(q, Tensor), "checked above"
    assert isinstance(k, Tensor), "checked above"
    assert isinstance(v, Tensor), "checked above"
    if k.shape != v.shape:
        raise Refused(f"k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise Refused(f"q and k must agree in tokens, batch and head dim, got {tuple(q.shape)} and {tuple(k.shape)}")
    if q.shape[2] % k.shape[2]:
        raise Refused(f"query heads must be a multiple of KV heads, got {q.shape[2]} and {k.shape[2]}")
    if not q.dtype == k.dtype == v.dtype:
        raise Refused(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if not q.device == k.device == v.device:
        raise Refused(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")


def _check_alone(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise Refused(f"{name} must be a tensor s b h d, got {type(x).__name__}")
    if hasattr(x, "to_local"):
        raise Refused(f"{name} must hold this rank's tokens, got a {type(x).__name__}; give {name}.to_local()")
    if x.layout is not torch.strided or x.is_nested:
        kind = "nested" if x.is_nested else str(x.layout)
        raise Refused(f"{name} must be a dense tensor s b h d, got a {kind} one; packed tensors are not supported")
    if x.ndim != 4:
        raise Refused(
            f"{name} must be s b h d, got {x.ndim} dims {tuple(x.shape)}; packed tensors are not supported, "
            f"one sequence t h d becomes one of batch 1 by {name}.unsqueeze(1)"
        )
    # an empty batch is an empty result
    for dim, size in zip(("tokens s", "heads", "head dim d"), (x.shape[0], *x.shape[2:]), strict=True):
        if not size:
            raise Refused(f"{name} (s b h d) must have {dim} of 1 or more, got {tuple(x.shape)}; leave the call out")
    if x.dtype not in DTYPES:
        raise Refused(f"{name} must be of dtype {' or '.join(BYTES)}, got {x.dtype}; convert it")
