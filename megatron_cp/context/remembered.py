"""Results that depend on a mask, in a bounded cache or with the pieces of a microbatch."""

from collections.abc import Callable
from functools import lru_cache, update_wrapper
from inspect import signature
from typing import cast

from megatron_cp.context.masks import Pieces


class Remembered[**P, R]:
    """A function of hashable arguments, one of them called `mask`, that is computed once for each of its last uses.

    At most `size` results are kept, as by `lru_cache`. Those for a mask with pieces are kept by the pieces and go with
    them: every microbatch brings its own, and would push out what all microbatches have in common.
    """

    def __init__(self, function: Callable[P, R], size: int) -> None:
        update_wrapper(self, function)
        self._function, self._cached = function, lru_cache(size)(function)
        self._place = list(signature(function).parameters).index("mask")
        self.cache_info, self.cache_clear = self._cached.cache_info, self._cached.cache_clear
        self.cache_parameters = self._cached.cache_parameters

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        mask = args[self._place]
        if not isinstance(mask, Pieces):
            return self._cached(*args, **kwargs)  # type: ignore[arg-type]
        # without the mask itself, so that the pieces are not kept by their own results
        key = (self._function, *args[: self._place], *args[self._place + 1 :], *kwargs.values())
        if key not in mask.results:
            mask.results[key] = self._function(*args, **kwargs)
        return cast("R", mask.results[key])


def remembered[**P, R](size: int) -> Callable[[Callable[P, R]], Remembered[P, R]]:
    """Decorate a function with `Remembered`."""
    return lambda function: Remembered(function, size)
