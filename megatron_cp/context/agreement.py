"""Agreement of all ranks on a call, before a message whose length depends on it."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_cp.comm import texts_of_all, values_of_all, word_of
from megatron_cp.context import cache_sizes
from megatron_cp.context.documents import Documents
from megatron_cp.context.plan import Plan
from megatron_cp.errors import Refused

DETAILS = 4096
"""Bytes in which a rank describes its call, once the ranks know that their calls differ."""
REFUSAL = 500
"""Characters of a rank's refusal that the other ranks see."""


class Brought(NamedTuple):
    """The part of a call that all ranks must have in common.

    shapes:    of the tensors, queries first; of anything else, none
    dtypes:    names, of anything but a tensor its type
    gradients: a backward pass may follow
    refusal:   one line, if this rank refuses its own call
    gpu:       model of the GPU, empty without one
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    gradients: bool
    plan: tuple[object, ...]
    refusal: str
    gpu: str


def wants_gradients(*tensors: object) -> bool:
    """True if a backward pass may follow a call on these tensors."""
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tensors)


@contextmanager
def refused_by_all(plan: Plan, *tensors: object, agreed: bool = False) -> Iterator[None]:
    """Raise on every rank what one rank refuses in this block, which comes before the comparison of calls.

    tensors: of the call, queries first
    agreed:  the ranks do not compare their calls: a refusal is then this rank's own
    """
    try:
        yield
    except Refused as error:
        if not agreed:
            agree(plan, *tensors, gradients=wants_gradients(*tensors), refusal=str(error))
        raise


def agree(
    plan: Plan,
    *tensors: object,
    packed: Documents | None = None,
    gradients: bool,
    choices: Sequence[object] = (),
    refusal: str = "",
) -> None:
    """Compare shapes and dtypes of these tensors [s b * d], queries first, plan, documents and GPU with other ranks'.

    choices: what else must be equal
    refusal: one line, if this rank refuses its own call
    One all-gather of 8 bytes per rank, which `Fabric.sent` does not count; on a GPU the host waits for it. Nothing is
    remembered from call to call, because a rank whose own call is as before cannot tell that another's changed.
    Raises ValueError on every rank if any two ranks differ.
    """
    if plan.cp.size == 1:
        return
    real = [x for x in tensors if isinstance(x, Tensor)]
    device = real[0].device if real else torch.device("cpu")
    mine = Brought(
        tuple(tuple(x.shape) if isinstance(x, Tensor) else () for x in tensors),
        tuple(str(x.dtype) if isinstance(x, Tensor) else type(x).__name__ for x in tensors),
        gradients,
        (*plan.terms, *([] if packed is None else [packed.term]), *choices),
        refusal[:REFUSAL],
        gpu_model(device),
    )
    if len(set(values_of_all(plan.cp, device, [_word(mine)]))) == 1:
        return
    described = json.dumps(mine._replace(plan=tuple(map(str, mine.plan))), ensure_ascii=False)
    assert len(described.encode()) <= DETAILS, "torch's tensors have 64 dims at most"
    raise Refused(_difference([_read(row) for row in texts_of_all(plan.cp, device, described, DETAILS)]))


def gpu_model(device: torch.device) -> str:
    """Return the model of the GPU that a device is, empty for anything else."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


# a long text, and the same from call to call
@lru_cache(cache_sizes.LAYOUTS)
def _word(brought: Brought) -> int:
    return word_of(repr(brought))


def _read(row: str) -> Brought:
    shapes, dtypes, gradients, plan, refusal, gpu = json.loads(row)
    return Brought(tuple(map(tuple, shapes)), tuple(dtypes), gradients, tuple(plan), refusal, gpu)


def _difference(ranks: Sequence[Brought]) -> str:
    # behind q, k and v comes a bias or a sink
    shapes, every_shape = [rank.shapes[:3] for rank in ranks], [rank.shapes for rank in ranks]
    lengths = [[str(shape[0]) if shape else "none" for shape in row] for row in shapes]
    if len(set(chain(*lengths))) > 1:
        held = _each(" / ".join(dict.fromkeys(row)) for row in lengths)
        return f"all ranks must hold equally many tokens, got {held}; pad the sequence to a common length"
    refusals = [f"rank {rank}: {each.refusal}" for rank, each in enumerate(ranks) if each.refusal]
    if refusals and len(set(shapes)) == 1:
        return "; ".join(refusals)
    if len(set(every_shape)) > 1:
        held = _each(" ".join(map(str, row)) for row in every_shape)
        rule = "all ranks must hold tensors of one shape (s, b, h, d)"
        return f"{rule}, got {held}; give all ranks the same batch and heads"
    if len({rank.dtypes for rank in ranks}) > 1:
        held = _each(" ".join(name.removeprefix("torch.") for name in dict.fromkeys(rank.dtypes)) for rank in ranks)
        return f"all ranks must hold tensors of one dtype, got {held}; convert them"
    if len({rank.plan for rank in ranks}) > 1:
        held = _each(" ".join(map(str, rank.plan)) for rank in ranks)
        return f"all ranks must attend by one plan, got {held}; make it from the same arguments on all ranks"
    if len({rank.gpu for rank in ranks}) > 1:
        held = _each(rank.gpu for rank in ranks)
        return f"all ranks must run on GPUs of one model, got {held}; use equal GPUs"
    held = _each("yes" if rank.gradients else "no" for rank in ranks)
    return f"all ranks must want gradients or none, got {held}; set requires_grad or torch.no_grad alike on all ranks"


def _each(values: Any) -> str:
    return ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
