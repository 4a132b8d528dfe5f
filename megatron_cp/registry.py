"""Registries: entries of one kind, found by name; installed packages add entries of their own."""

import difflib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, NamedTuple, Protocol

from megatron_cp.errors import Refused

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

_loading = ContextVar("_loading", default=False)


class Entry(Protocol):
    """Fields that every registry entry must have."""

    @property
    def name(self) -> str: ...
    @property
    def aliases(self) -> tuple[str, ...]: ...


class Plugin(NamedTuple):
    """An entry that an installed package brings.

    name:    of the entry point, which is the entry's
    package: name and version
    fault:   one line, where the entry cannot be used; else empty
    """

    name: str
    package: str
    fault: str


class Registry[T: Entry]:
    """Entries of one kind, found by name or alias: ours in the order in which they were listed, then packages' own.

    own:   entries of this project
    group: of entry points, each an entry of the same type; they are loaded with the first look at the entries, because
        their modules import ours
    """

    def __init__(self, kind: str, entries: Iterable[T], group: str | None = None) -> None:
        self.kind = kind
        self.own = tuple(entries)
        self._not_loaded = group
        self._by_name = {name: entry for entry in self.own for name in _names(entry)}
        self._entries = {entry.name: entry for entry in self.own}
        self._plugins: list[Plugin] = []

    def __iter__(self) -> Iterator[T]:
        self._load()
        return iter(self._entries.values())

    @property
    def names(self) -> list[str]:
        """Names of the entries, without aliases."""
        return [entry.name for entry in self]

    @property
    def plugins(self) -> list[Plugin]:
        """Entries that installed packages bring, those with a fault too."""
        self._load()
        return self._plugins

    def get(self, name: str) -> T:
        """Return the entry called `name`; raise Refused with a suggestion if there is none."""
        self._load()
        if name in self._by_name:
            return self._by_name[name]
        for plugin in self._plugins:
            if plugin.name == name:
                raise Refused(f"{plugin.fault}; mend the package or uninstall it")
        raise unknown(self.kind, name, self._by_name)

    def _load(self) -> None:
        # a plug-in may look at the entries of any registry while it is imported
        if self._not_loaded is None or _loading.get():
            return
        from importlib.metadata import entry_points

        points, self._not_loaded = entry_points(group=self._not_loaded), None
        for point in points:
            package = f"{point.dist.name} {point.dist.version}" if point.dist else point.value
            fault = ""
            token = _loading.set(True)
            try:
                self._add(point)
            # a package may raise anything
            except Exception as error:
                text = str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {error}"
                fault = f"{self.kind} {point.name!r} of {package} cannot be used: {' '.join(text.split())}"
            finally:
                _loading.reset(token)
            self._plugins.append(Plugin(point.name, package, fault))

    def _add(self, point: "EntryPoint") -> None:
        entry: T = point.load()
        wanted = type(self.own[0])
        if not isinstance(entry, wanted):
            raise Refused(
                f"{point.value} has the type {type(entry).__name__}, not {wanted.__module__}.{wanted.__name__}"
            )
        if entry.name != point.name:
            raise Refused(f"{point.value} is called {entry.name!r}; give the entry point the same name")
        if taken := self._by_name.keys() & _names(entry):
            raise Refused(f"the name {min(taken)!r} is taken; take another one")
        self._entries[entry.name] = entry
        self._by_name |= dict.fromkeys(_names(entry), entry)


def _names(entry: Entry) -> tuple[str, ...]:
    return entry.name, *entry.aliases


def unknown(kind: str, name: str, known: Iterable[str], place: str = "") -> Refused:
    """Return the error for a name that is not among `known`, with the nearest known one as a suggestion.

    place: file and line, or the flag, that the name was read from; it goes in front of the text
    """
    names = list(known)
    where = f"{place}: " if place else ""
    return Refused(f"{where}unknown {kind} {name!r}{suggest(name, names)}; known: {', '.join(names)}")


def suggest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """Return `; did you mean 'x'?` for the nearest known name, or an empty text where none is as near as `cutoff`."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]!r}?" if near else ""
