"""Refusals of tensors that attention does not take, whatever the algorithm; every rank of a call raises them alike."""

import math
from typing import Any

import torch
from torch import Tensor

from megatron_cp.dtypes import BYTES
from megatron_cp.errors import Refused, shown

DTYPES: tuple[torch.dtype, ...] = tuple(getattr(torch, name) for name in BYTES)


def check_inputs(q: object, k: object, v: object, *, cross: bool = False) -> None:
    """Raise Refused unless q [s b h d], k [s b g d] and v [s b g dv] are tensors that can be attended.

    cross: there may be other numbers of keys than of queries
    """
    for name, x in zip("qkv", (q, k, v), strict=True):
        _check_alone(name, x)
    assert isinstance(q, Tensor), "checked above"
    assert isinstance(k, Tensor), "checked above"
    assert isinstance(v, Tensor), "checked above"
    if k.shape[:3] != v.shape[:3]:
        raise Refused(f"k and v must agree in tokens, batch and heads, got {tuple(k.shape)} and {tuple(v.shape)}")
    if q.shape[cross:2] != k.shape[cross:2] or q.shape[3] != k.shape[3]:
        raise Refused(f"q and k must agree in tokens, batch and head dim, got {tuple(q.shape)} and {tuple(k.shape)}")
    if q.shape[2] % k.shape[2]:
        raise Refused(f"query heads must be a multiple of KV heads, got {q.shape[2]} and {k.shape[2]}")
    if not q.dtype == k.dtype == v.dtype:
        raise Refused(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if not q.device == k.device == v.device:
        raise Refused(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")


def as_sink(sink: Any, q: object) -> Any:
    """Return a sink that is a number as one logit for each query head; anything else comes back as it is."""
    value = as_number(sink)
    if value is None or not (isinstance(q, Tensor) and q.ndim == 4):
        return sink
    if not value < math.inf:
        raise Refused(f"sink must be a number below infinity, got {value}; leave it out for a softmax without a sink")
    return torch.full(q.shape[2:3], value, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)


def as_number(sink: object) -> float | None:
    """Return a sink that is a number as a float, None for anything else."""
    if not isinstance(sink, int | float) or isinstance(sink, bool):
        return None
    try:
        return float(sink)
    except OverflowError:
        return math.inf if sink > 0 else -math.inf


def check_sink(sink: object, q: Tensor) -> None:
    """Raise Refused unless `sink` [h] or [b h] has a logit for each query head of q [s b h d]."""
    batch, heads = q.shape[1:3]
    if not isinstance(sink, Tensor):
        raise Refused(
            f"sink must be a number or a tensor with a logit for each of {heads} query heads, got {shown(sink)}"
        )
    check_dense("sink", sink, "h or b h")
    if sink.shape not in ((heads,), (batch, heads)):
        raise Refused(
            f"sink must have a logit for each of the {heads} query heads of this rank, got shape {tuple(sink.shape)}; "
            f"give ({heads},), or ({batch}, {heads}) for sinks of each sequence"
        )
    if sink.dtype not in DTYPES:
        raise Refused(f"sink must be of dtype {' or '.join(BYTES)}, got {sink.dtype}; convert it")
    if sink.device != q.device:
        raise Refused(f"sink must be on the device of q, got {sink.device} and {q.device}; move it")


def check_dense(name: str, x: Tensor, dims: str, hint: str = "; give a dense one") -> None:
    """Raise Refused for a distributed, a sparse and a nested tensor."""
    if hasattr(x, "to_local"):
        raise Refused(f"{name} must hold this rank's part, got a {type(x).__name__}; give {name}.to_local()")
    if x.layout is not torch.strided or x.is_nested:
        kind = "nested" if x.is_nested else str(x.layout)
        raise Refused(f"{name} must be a dense tensor {dims}, got a {kind} one{hint}")


def _check_alone(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise Refused(f"{name} must be a tensor s b h d, got {type(x).__name__}")
    check_dense(name, x, "s b h d", "; packed tensors are not supported")
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
