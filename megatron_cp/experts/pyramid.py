"""DeepSpeed-MoE's pyramid (arXiv:2201.05596, 4.1): later layers have more experts than earlier ones."""

from collections.abc import Sequence

from megatron_cp.errors import Refused
from megatron_cp.units import is_whole

FLAG = "--moe-layer-experts"


def experts_of_layers(text: str | None, experts: int, layers: int) -> Sequence[int]:
    """Return the experts of each layer: `experts`, and other numbers from some layers on.

    text: such as 13:64,23:128 for 64 experts from layer 13 on and 128 from layer 23 on; None for none

    Raises ValueError for what is no such text, for layers that the model does not have, and for numbers that are no
    multiples of `experts`, so that what divides it divides all of them.
    """
    steps = [(1, experts), *([] if text is None else [_step(text, part) for part in text.split(",")])]
    starts = [first for first, _ in steps]
    if starts != sorted(set(starts)) or starts[-1] > layers:
        raise Refused(f"{FLAG} needs layers in rising order, from 2 to {layers}, got {text}; change them")
    if others := [number for _, number in steps if number % experts]:
        raise Refused(f"{FLAG} needs multiples of --num-experts {experts}, got {others[0]}; change one of the two")
    ends = [*starts[1:], layers + 1]
    return [number for (first, number), end in zip(steps, ends, strict=True) for _ in range(first, end)]


def _step(text: str, part: str) -> tuple[int, int]:
    first, _, number = part.partition(":")
    if not (is_whole(first) and is_whole(number) and int(first) and int(number)):
        raise Refused(f"{FLAG} is LAYER:EXPERTS,…, such as 13:64,23:128, got {text}; change it")
    return int(first), int(number)
