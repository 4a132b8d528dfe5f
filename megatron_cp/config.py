"""The environment: the only file that reads or sets its variables."""

import os
from collections.abc import Mapping


def environment() -> dict[str, str]:
    """A copy of the process's environment."""
    return dict(os.environ)


def variable(name: str, default: str = "") -> str:
    """The environment variable `name`."""
    return os.environ.get(name, default)


def set_missing(values: Mapping[str, str]) -> dict[str, str]:
    """Set those of `values` that the environment lacks; what was set is returned, what was there stays."""
    missing = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(missing)
    return missing
