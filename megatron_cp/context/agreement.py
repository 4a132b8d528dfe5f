"""Agreement of all ranks on the shapes of their tensors, before a message whose length depends on them."""

from collections.abc import Sequence
from itertools import batched

from torch import Tensor

from megatron_cp.comm import Fabric, values_of_all
from megatron_cp.errors import Refused


def agree_on_shapes(fabric: Fabric, *tensors: Tensor) -> None:
    """Compare the shapes of these tensors [s b * d], queries first, with those of all other ranks.

    One all-gather of 32 bytes per tensor, which `Fabric.sent` does not count; on a GPU the host waits for it. Nothing
    is remembered from call to call, because a rank whose own shapes are as before cannot tell that another's changed.
    Raises ValueError on every rank if any two ranks differ.
    """
    if fabric.size == 1:
        return
    sizes = [size for tensor in tensors for size in tensor.shape]
    shapes = [tuple(batched(values, 4)) for values in values_of_all(fabric, tensors[0].device, sizes)]
    if len(set(shapes)) > 1:
        raise Refused(_difference(shapes))


def _difference(shapes: Sequence[tuple[tuple[int, ...], ...]]) -> str:
    if len({tokens for tensors in shapes for tokens, *_ in tensors}) > 1:
        each = ", ".join(
            f"rank {rank}: {' / '.join(str(tokens) for tokens in dict.fromkeys(shape[0] for shape in tensors))}"
            for rank, tensors in enumerate(shapes)
        )
        return f"all ranks must hold equally many tokens, got {each}; pad the sequence to a common length"
    each = ", ".join(f"rank {rank}: {' '.join(map(str, tensors))}" for rank, tensors in enumerate(shapes))
    return f"all ranks must hold tensors of one shape (s, b, h, d), got {each}; give all ranks the same batch and heads"
