"""Results of looking at a machine: one finding per subject, with its remedy."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Literal, NamedTuple

Status = Literal["ok", "optional", "broken"]


class Finding(NamedTuple):
    """State of one subject; `remedy` is empty where nothing has to be done."""

    subject: str
    status: Status
    found: str
    remedy: str = ""


OLDEST_TORCH = (2, 8)
"""The oldest torch that the tests pass with."""

UPGRADE_TORCH = "pip install 'torch>=2.8'"


def guarded(subject: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Yield the findings of `look`; an exception in it becomes a finding."""
    try:
        yield from look()
    except Exception as error:
        yield Finding(
            subject, "broken", f"{type(error).__name__}: {error}", "repair the cause of the error, then run again"
        )


def installed(name: str) -> str | None:
    """Return the installed version of a package; None without it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def about() -> str:
    """Return the versions that run here, and the commit of the current folder, for the log of a run."""
    packages = ("megatron-cp", "torch", "megatron-core", "transformer-engine")
    found = [f"{package} {number}" for package in packages if (number := installed(package))]
    git = shutil.which("git")
    commit = ""
    if git:
        asked = [git, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return ", ".join([*found, *([f"commit {commit}"] if commit else [])])


def reaches(version: str, oldest: tuple[int, ...]) -> bool:
    """True if a version is the oldest one that will do, or a later one."""
    return tuple(int(part) for part in version.split(".")[: len(oldest)]) >= oldest
