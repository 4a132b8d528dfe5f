"""Packages of attention kernels: the releases whose signatures were compared with our calls, and what a GPU must be."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from megatron_cp import config
from megatron_cp.errors import CannotRun
from megatron_cp.findings import installed

UNCHECKED = "MEGATRON_CP_UNCHECKED_KERNELS"
"""Environment variable; 1 allows releases whose signatures were never compared with our calls."""

AMPERE = (8, 0)


class Package(NamedTuple):
    """A package that brings a kernel.

    checked: releases whose signatures are recorded in tests/kernels/signatures.json; 2.6 stands for all 2.6.x
    install: the words after "pip install", or what to do
    """

    name: str
    checked: tuple[str, ...]
    install: str

    def missing(self) -> str | None:
        """Return what this machine lacks of it, or None: the package itself, or a release that was checked."""
        version = installed(self.name)
        if version is None:
            return f"needs the {self.name} package ({self.install})"
        if self.knows(version) or config.variable(UNCHECKED) == "1":
            return None
        return (
            f"was checked with {self.name} {', '.join(self.checked)}, not with the {version} that is installed; "
            f"install one of these or set {UNCHECKED}=1 to try it"
        )

    def knows(self, version: str) -> bool:
        """Return True if this release was checked; what is after a + names a build of it."""
        release = version.split("+")[0]
        return any(release == known or release.startswith(f"{known}.") for known in self.checked)


def lacking_gpu(device: str, at_least: tuple[int, int] = AMPERE, generation: str = "an Ampere GPU") -> str | None:
    """Return what this machine's GPU lacks, or None, as on a machine without one, where recipes are checked."""
    if device != "cuda" or not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_capability()
    if found >= at_least:
        return None
    return (
        f"needs {generation} or a later one, compute capability {at_least[0]}.{at_least[1]}; "
        f"{torch.cuda.get_device_name()} has {found[0]}.{found[1]}"
    )


def parameters(function: Callable[..., Any]) -> list[str]:
    """Return the names of a function's parameters, also of one that is registered as an operator of torch."""
    return [*inspect.signature(getattr(function, "_init_fn", function)).parameters]


def check_parameters(package: str, function: Callable[..., Any], *conventions: Sequence[str]) -> Sequence[str]:
    """Return the calling convention that a function has; raises CannotRun when it has none of them."""
    found = parameters(function)
    for expected in conventions:
        if found == [*expected]:
            return expected
    name = getattr(function, "__name__", str(function))
    raise CannotRun(
        f"{name} of {package} {installed(package) or ''} takes {', '.join(found)}: it was never called that way here; "
        "install a release that was checked or use kernel 'auto'"
    )
