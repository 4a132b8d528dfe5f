"""Results that depend on masks and layouts, in a bounded cache or with the documents of a microbatch."""

from collections.abc import Callable
from functools import lru_cache, update_wrapper
from inspect import signature
from typing import Any, cast

NAMES = ("mask", "layout", "members", "before", "after")
"""Parameters whose arguments may keep results, in the order in which they are asked."""


class Keeper:
    """An argument that keeps the results that depend on it."""

    results: dict[tuple[Any, ...], Any]


class Remembered[**P, R]:
    """A function of hashable arguments that is computed once for each of its last uses.

    At most `size` results are kept, as by `lru_cache`. Those for a mask with pieces, or for a layout planned for
    documents, are kept by these and go with them: every microbatch brings its own, and would push out what all
    microbatches have in common.
    """

    def __init__(self, function: Callable[P, R], size: int) -> None:
        update_wrapper(self, function)
        self._function, self._cached = function, lru_cache(size)(function)
        parameters = list(signature(function).parameters)
        self._places = [parameters.index(name) for name in NAMES if name in parameters]
        self.cache_info, self.cache_clear = self._cached.cache_info, self._cached.cache_clear
        self.cache_parameters = self._cached.cache_parameters

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        for place in self._places:
            keeper = args[place]
            if isinstance(keeper, Keeper):
                # without itself, so that it is not kept by its own results
                key = (self._function, place, *args[:place], *args[place + 1 :], *kwargs.values())
                if key not in keeper.results:
                    keeper.results[key] = self._function(*args, **kwargs)
                return cast("R", keeper.results[key])
        return self._cached(*args, **kwargs)  # type: ignore[arg-type]


def remembered[**P, R](size: int) -> Callable[[Callable[P, R]], Remembered[P, R]]:
    """Decorate a function with `Remembered`."""
    return lambda function: Remembered(function, size)
