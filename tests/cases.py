"""Which cases of a parametrised law run by default; all others are slow."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def slow_unless(chosen: Callable[..., bool] | Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """The cases as parameters, those that are not chosen marked slow.

    chosen: the cases that run by default, or a function of a case's values that is true for them
    """
    wanted = chosen if callable(chosen) else list(chosen)
    parameters, found = [], 0
    for case in cases:
        values = case if isinstance(case, tuple) and not hasattr(case, "_fields") else (case,)
        keep = wanted(*values) if callable(wanted) else case in wanted
        found += keep
        parameters.append(pytest.param(*values, marks=[] if keep else pytest.mark.slow))
    assert found, "no case is chosen"
    assert callable(wanted) or found == len(wanted), f"not all of {wanted} are cases"
    return parameters
