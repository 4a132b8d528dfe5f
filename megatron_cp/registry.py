"""Registries: entries of one kind, found by name."""

import difflib
from collections.abc import Iterable, Iterator
from typing import Protocol

from megatron_cp.errors import Refused


class Entry(Protocol):
    """Fields that every registry entry must have."""

    @property
    def name(self) -> str: ...
    @property
    def aliases(self) -> tuple[str, ...]: ...


class Registry[T: Entry]:
    """Entries of one kind, found by name or alias, in the order in which they were listed."""

    def __init__(self, kind: str, entries: Iterable[T]) -> None:
        self.kind = kind
        self._entries = {entry.name: entry for entry in entries}
        self._by_name = {name: entry for entry in self for name in (entry.name, *entry.aliases)}

    def __iter__(self) -> Iterator[T]:
        return iter(self._entries.values())

    @property
    def names(self) -> list[str]:
        """Names of the entries, without aliases."""
        return list(self._entries)

    def get(self, name: str) -> T:
        """Return the entry called `name`; raise Refused with a suggestion if there is none."""
        if name in self._by_name:
            return self._by_name[name]
        raise unknown(self.kind, name, self._by_name)


def unknown(kind: str, name: str, known: Iterable[str], place: str = "") -> Refused:
    """Return the error for a name that is not among `known`, with the nearest known one as a suggestion.

    place: file and line, or the flag, that the name was read from; it goes in front of the text
    """
    names = list(known)
    where = f"{place}: " if place else ""
    return Refused(f"{where}unknown {kind} {name!r}{suggest(name, names)}; known: {', '.join(names)}")


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the nearest known name, or an empty text."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
