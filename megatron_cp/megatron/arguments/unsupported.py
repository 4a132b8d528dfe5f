"""Unsupported options, each with the alternative to use."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from megatron_cp.errors import Refused


class Unsupported(NamedTuple):
    """An unsupported option; `asked` is True for arguments, or a config, that ask for it."""

    what: str
    asked: Callable[[Any], bool]
    way_out: str


def read(source: Any, name: str, default: Any = None) -> Any:
    """Return an attribute of arguments or of a config, or the default where it is missing."""
    return getattr(source, name, default)


def refuse(features: Iterable[Unsupported], source: Any, who: str) -> None:
    """Raise ValueError, `who` being its subject, for the first of the features that `source` asks for."""
    for feature in features:
        if feature.asked(source):
            raise Refused(f"{who} does not do {feature.what}; {feature.way_out}")
