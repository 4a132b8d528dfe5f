"""Process environment and shipped files: the only file that reads or sets environment variables."""

import os
from collections.abc import Mapping
from pathlib import Path


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


def configs_folder() -> Path:
    """Where the shipped recipes lie: inside the installed package, or next to it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"
