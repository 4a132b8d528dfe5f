"""Access the process environment and the shipped files; no other file reads or sets environment variables."""

import os
from collections.abc import Mapping
from pathlib import Path


def environment() -> dict[str, str]:
    """Return a copy of the process's environment."""
    return dict(os.environ)


def variable(name: str, default: str = "") -> str:
    """Return the environment variable `name`."""
    return os.environ.get(name, default)


def set_missing(values: Mapping[str, str]) -> dict[str, str]:
    """Set those of `values` that the environment lacks, and return them; existing variables keep their values."""
    missing = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(missing)
    return missing


def site_file() -> Path | None:
    """Return the file of this site's settings for jobs; None where there is none.

    $MEGATRON_CP_SITE names it, and is returned whether it exists or not; otherwise it is megatron-cp/site.yaml in
    $XDG_CONFIG_HOME, by default ~/.config.
    """
    if given := variable("MEGATRON_CP_SITE"):
        return Path(given)
    usual = Path(variable("XDG_CONFIG_HOME") or os.path.expanduser("~/.config"), "megatron-cp", "site.yaml")
    return usual if usual.is_file() else None


def configs_folder() -> Path:
    """Return the folder of the shipped recipes: inside the installed package, or next to it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"
