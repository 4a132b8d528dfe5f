"""Read a config of another system key by key: each becomes flags, or is named with the reason why it does not.

A table is a list of rows, each for one key or for several that become the same flags. Keys are dotted; a row for a
section takes all keys below it that have no row of their own.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Any, NamedTuple

from megatron_cp.errors import shown
from megatron_cp.registry import suggest

type Flags = dict[str, tuple[str, ...]]

# keys whose values stay out of terminals and files
_SECRET = re.compile(r"(key|token|secret|password)$", re.IGNORECASE)
NONE: Mapping[str, tuple[str, ...]] = MappingProxyType({})


class Outcome(StrEnum):
    """End of one key: the same thing, nearly the same, not possible here, or without effect on what is trained."""

    MAPPED = "mapped"
    APPROXIMATED = "approximated"
    REFUSED = "refused"
    IGNORED = "ignored"
    UNKNOWN = "unknown"


class Answer(NamedTuple):
    """Flags that a key becomes, or a shipped file that the recipe extends, and a note where it is not plainly mapped.

    `()` stands for a bare flag.
    """

    flags: Mapping[str, tuple[str, ...]] = NONE
    outcome: Outcome = Outcome.MAPPED
    note: str = ""
    extends: str = ""


class ForeignConfig(NamedTuple):
    """A config with what is known beside it.

    values:    by dotted key
    beside:    flags given by hand, which win
    processes: of the run; None where nothing says
    """

    values: Mapping[str, Any]
    beside: Mapping[str, tuple[str, ...]] = NONE
    processes: int | None = None

    def number(self, *names: str) -> int | None:
        """Return the first whole number under these keys or flags."""
        for name in names:
            value = self.beside[name][0] if self.beside.get(name) else self.values.get(name)
            if re.fullmatch(r"\d+(\.0*)?", str(value)):
                return int(float(str(value)))
        return None


class Key(NamedTuple):
    """A row: keys, what they become as tables show it, and how a value is read.

    how:     `mapped` and so on; `by value` where that depends
    section: the row also takes all keys below
    """

    names: tuple[str, ...]
    becomes: str
    read: Callable[[Any, ForeignConfig], Answer]
    how: str
    note: str = ""
    section: bool = False


class Absent(NamedTuple):
    """Flags for a key that a config leaves out, where the other system's default is not Megatron's."""

    names: tuple[str, ...]
    flags: str
    note: str


class System(NamedTuple):
    """Another system: its table, and words for `--help` and pages."""

    name: str
    title: str
    files: str
    keys: tuple[Key, ...]
    absent: tuple[Absent, ...] = ()

    def row(self, key: str) -> tuple[str, Key] | None:
        """Return the row for a key, with the key or the section that it stands under."""
        rows = {name: row for row in self.keys for name in row.names}
        parts = key.split(".")
        for end in range(len(parts), 0, -1):
            name = ".".join(parts[:end])
            if name in rows and (end == len(parts) or rows[name].section):
                return name, rows[name]
        return None

    def known(self, values: Mapping[str, Any]) -> int:
        """Return how many keys have a row."""
        return sum(self.row(key) is not None for key in flat(values))


class KeyEnd(NamedTuple):
    """One key of a config with its end."""

    key: str
    value: Any
    taken: Answer


class Reading(NamedTuple):
    """Flags of a whole config, shipped files to extend, and the end of each key."""

    system: System
    flags: Flags
    extends: tuple[str, ...]
    entries: tuple[KeyEnd, ...]

    def keys(self, outcome: Outcome) -> list[str]:
        """Return the keys that ended so."""
        return [entry.key for entry in self.entries if entry.taken.outcome == outcome]

    def told(self) -> list[str]:
        """Return the summary: a line of counts, then lines that name every key."""
        counts = ", ".join(f"{len(found)} {outcome}" for outcome in Outcome if (found := self.keys(outcome)))
        lines = [f"{self.system.title}: {counts or 'no keys'}"]
        if mapped := self.keys(Outcome.MAPPED):
            lines.append(f"mapped: {', '.join(mapped)}")
        for outcome in (Outcome.APPROXIMATED, Outcome.REFUSED, Outcome.UNKNOWN):
            lines += [
                f"{outcome}: {entry.key} {_plain(entry.key, entry.value)}: {entry.taken.note}"
                for entry in self.entries
                if entry.taken.outcome == outcome
            ]
        by_note: dict[str, list[str]] = {}
        for entry in self.entries:
            if entry.taken.outcome == Outcome.IGNORED:
                by_note.setdefault(entry.taken.note, []).append(entry.key)
        lines += [f"ignored: {', '.join(keys)}: {note}" for note, keys in by_note.items()]
        return [" ".join(line.split()) for line in lines]


def read(system: System, config: ForeignConfig) -> Reading:
    """Return what a config becomes; flags given beside it win, and of two keys for one flag the first."""
    values = flat(config.values)
    config = config._replace(values=values)
    flags: Flags = {}
    extends: list[str] = []
    entries: list[KeyEnd] = []
    for key, value, row in _found(system, values):
        taken = _taken(system, row, key, value, config)
        taken = _without_conflicts(taken, flags, config.beside)
        flags |= {flag: given for flag, given in taken.flags.items() if flag not in (*flags, *config.beside)}
        extends += [taken.extends] if taken.extends and taken.extends not in extends else []
        entries.append(KeyEnd(key, value, taken))
    for names, others, note in system.absent:
        missing = {flag: given for flag, given in words(others).items() if flag not in (*flags, *config.beside)}
        if missing and not any(system.row(key) and key in names for key in values):
            flags |= missing
            entries.append(KeyEnd(names[0], "is not there", Answer(missing, Outcome.APPROXIMATED, note)))
    return Reading(system, flags, tuple(extends), tuple(entries))


def flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return nested sections as dotted keys; an empty section keeps its own."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{before}{name}"
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{key}.")
        else:
            found[key] = value
    return found


def _found(system: System, values: Mapping[str, Any]) -> Iterator[tuple[str, Any, Key | None]]:
    """Yield each key, or section that one row takes, with its value and its row."""
    seen: set[str] = set()
    for key, value in values.items():
        name, row = system.row(key) or (key, None)
        if name not in seen:
            seen.add(name)
            below = {other.removeprefix(f"{name}."): v for other, v in values.items() if other.startswith(f"{name}.")}
            yield name, value if name == key else below, row


def _taken(system: System, row: Key | None, key: str, value: Any, config: ForeignConfig) -> Answer:
    if row is None:
        known = [name for found in system.keys for name in found.names]
        return Answer({}, Outcome.UNKNOWN, f"not in the table, left out{suggest(key, known, 0.8)}")
    if value is None:
        return Answer({}, Outcome.IGNORED, "null, the default")
    if value in ("auto", "???") and row.how != Outcome.IGNORED:
        flag = f": give {row.becomes}" if row.becomes else ""
        return Answer({}, Outcome.REFUSED, f"filled in by another program{flag}")
    if isinstance(value, Computed) or (isinstance(value, str) and re.search(r"\$\{(?!\w+(:-[^}]*)?\})", value)):
        return Answer({}, Outcome.REFUSED, f"computed elsewhere: give {row.becomes or 'its value'} by hand")
    try:
        return row.read(value, config)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError):
        return Answer({}, Outcome.REFUSED, f"cannot be read as {row.becomes or 'a value of this key'}")


def _without_conflicts(taken: Answer, flags: Flags, beside: Mapping[str, tuple[str, ...]]) -> Answer:
    """Say which flags of a key were not taken, for another value is there already."""
    for others, where in ((beside, "given by hand"), (flags, "of a key above")):
        differing = [flag for flag, given in taken.flags.items() if others.get(flag, given) != given]
        if differing:
            note = "; ".join(f"{flag} {' '.join(others[flag])}".rstrip() + f" {where} counts" for flag in differing)
            outcome = Outcome.IGNORED if where == "given by hand" else Outcome.APPROXIMATED
            return taken._replace(outcome=outcome, note=f"{taken.note}; {note}".removeprefix("; "))
    return taken


class Computed(NamedTuple):
    """A value that only running the config's code would show: its source."""

    source: str

    def __str__(self) -> str:
        return self.source


def _plain(key: str, value: Any) -> str:
    if _SECRET.search(key):
        return "(not shown)"
    if isinstance(value, Mapping):
        return f"({len(flat(value))} keys)"
    return value if isinstance(value, str) and len(value) < 60 else shown(str(value)).strip("'\"")


def words(text: str) -> Flags:
    """Return the flags of a text without quotes, such as `--fp16 --lr 1`."""
    found: Flags = {}
    flag = ""
    for word in text.split():
        if word.startswith("--"):
            flag = word
            found[flag] = ()
        else:
            found[flag] = (*found[flag], word)
    return found


def text(value: Any) -> str:
    """Return a value as a flag takes it: large round numbers without a point or exponent."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer() and abs(value) >= 1000:
        return str(int(value))
    return str(value)


def is_true(value: Any) -> bool:
    """Return a truth value; raises ValueError for what is none."""
    if str(value).lower() in ("true", "1", "yes", "on"):
        return True
    if str(value).lower() in ("false", "0", "no", "off", "none", ""):
        return False
    raise ValueError(value)


def value(names: str, flag: str, near: str = "") -> Key:
    """Return a row for keys whose value a flag takes as it is; `near` is the reason where it is not the same."""
    outcome = Outcome.APPROXIMATED if near else Outcome.MAPPED

    def taken(found: Any, _: ForeignConfig) -> Answer:
        several = found if isinstance(found, list | tuple) else [found]
        return Answer({flag: tuple(map(text, several))}, outcome, near)

    return Key(tuple(names.split()), f"{flag} VALUE", taken, outcome, near)


def switch(names: str, on: str = "", off: str = "", near: str = "") -> Key:
    """Return a row for truth values: flags for true and for false."""
    outcome = Outcome.APPROXIMATED if near else Outcome.MAPPED

    def taken(found: Any, _: ForeignConfig) -> Answer:
        flags = words(on if is_true(found) else off)
        return Answer(flags, outcome if flags else Outcome.MAPPED, near if flags else "")

    becomes = "; ".join(f"{word}: {flags}" for word, flags in (("true", on), ("false", off)) if flags)
    return Key(tuple(names.split()), becomes, taken, outcome, near)


def choice(names: str, flags_of: Mapping[str, str], near: str = "", other: str = "") -> Key:
    """Return a row for names, each with its flags; any other name is refused with `other`."""
    outcome = Outcome.APPROXIMATED if near else Outcome.MAPPED

    def taken(found: Any, _: ForeignConfig) -> Answer:
        name = str(found).lower()
        if name not in flags_of:
            return Answer({}, Outcome.REFUSED, other or f"only {', '.join(flags_of)} are known here")
        flags = words(flags_of[name])
        return Answer(flags, outcome if flags else Outcome.MAPPED, near if flags else "")

    becomes = "; ".join(f"{name}: {flags or 'nothing'}" for name, flags in flags_of.items())
    return Key(tuple(names.split()), becomes, taken, outcome, near or (f"else {other}" if other else ""))


def ignored(names: str, note: str, section: bool = False) -> Key:
    """Return a row for keys that change nothing that is trained."""
    return Key(tuple(names.split()), "", lambda *_: Answer({}, Outcome.IGNORED, note), Outcome.IGNORED, note, section)


def refused(names: str, note: str, neutral: tuple[Any, ...] = (), section: bool = False) -> Key:
    """Return a row for what cannot be had here; a value that turns it off, or one of `neutral`, refuses nothing."""

    def taken(found: Any, _: ForeignConfig) -> Answer:
        is_off = isinstance(found, Mapping) and not _is_on(found.get("enabled", True))
        if is_off or found in neutral or (not isinstance(found, Mapping) and not _is_on(found)):
            return Answer({})
        return Answer({}, Outcome.REFUSED, note)

    return Key(tuple(names.split()), "", taken, Outcome.REFUSED, note, section)


def _is_on(found: Any) -> bool:
    try:
        return is_true(found)
    except ValueError:
        return True


def derived(
    names: str, becomes: str, taken: Callable[[Any, ForeignConfig], Answer], note: str = "", how: str = ""
) -> Key:
    """Return a row for a value that is computed; its note is for tables."""
    return Key(tuple(names.split()), becomes, taken, how or "by value", note)


def when(switch_key: str, key: Key) -> Key:
    """Return a row that counts only where another key is true."""

    def taken(found: Any, config: ForeignConfig) -> Answer:
        on = config.values.get(switch_key, False)
        if on == "auto" or is_true(on):
            return key.read(found, config)
        return Answer({}, Outcome.IGNORED, f"{switch_key} is off")

    return key._replace(read=taken)


def near(flags: Mapping[str, tuple[str, ...]], note: str, extends: str = "") -> Answer:
    """Return flags that are nearly the same, with the difference."""
    return Answer(flags, Outcome.APPROXIMATED, note, extends)


def not_here(note: str) -> Answer:
    """Return a refusal."""
    return Answer({}, Outcome.REFUSED, note)


def same(section: str, fields: str) -> list[Key]:
    """Return a row for each field whose flag has the same name and takes its value."""
    return [value(f"{section}.{field}", f"--{field.replace('_', '-')}") for field in fields.split()]


def switches(section: str, fields: str) -> list[Key]:
    """Return a row for each truth value whose flag has the same name."""
    return [switch(f"{section}.{field}", f"--{field.replace('_', '-')}") for field in fields.split()]


def pair(names: str, flags: tuple[str, str]) -> Key:
    """Return a row for a list of two values, one for each flag."""

    def taken(found: Any, _: ForeignConfig) -> Answer:
        first, second = found
        return Answer({flags[0]: (text(first),), flags[1]: (text(second),)})

    return Key(tuple(names.split()), f"{flags[0]} FIRST {flags[1]} SECOND", taken, Outcome.MAPPED)
