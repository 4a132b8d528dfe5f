"""What a run may ask for and does not get: named, with a way out."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from megatron_cp.errors import Refused


class Unsupported(NamedTuple):
    """Something that a user can ask for and that what runs here does not do; `asked` reads arguments or a config."""

    what: str
    asked: Callable[[Any], bool]
    way_out: str


def read(source: Any, name: str, default: Any = None) -> Any:
    """An attribute of arguments or of a config, which may not have it."""
    return getattr(source, name, default)


def refuse(features: Iterable[Unsupported], source: Any, who: str) -> None:
    """Raise ValueError, `who` being its subject, for the first of the features that `source` asks for."""
    for feature in features:
        if feature.asked(source):
            raise Refused(f"{who} does not do {feature.what}; {feature.way_out}")
