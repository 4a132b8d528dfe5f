"""Read one file of a recipe: its sections as texts, each with file and line."""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode

from megatron_cp.errors import Refused
from megatron_cp.registry import unknown
from megatron_cp.yaml_file import parse, shown

SECTIONS = ("ENV_VARS", "MODEL_ARGS", "LAUNCH", "DATA", "SLURM")
# where true and false mean a flag, not a text
FLAG_SECTIONS = SECTIONS[1:]
CLUSTER = "CLUSTER"
# lines of bash at the start of a job
SETUP = "SETUP"
# read by Megatron's test harness; without effect on the training command
HARNESS_SECTIONS = (
    *("TEST_TYPE", "METRICS", "MODE", "LAUNCHER", "THROUGHPUT_TEST_PARAMS", "SKIP_PYTEST"),
    *("BEFORE_SCRIPT", "AFTER_SCRIPT"),
)
_VARIABLE = re.compile(r"\$\{(\w+)(?P<fallback>:-(?P<default>(?:[^{}]|\{[^{}]*\})*))?\}")
# tags that YAML assigns to plain text by itself
_PLAIN_TAGS = [f"tag:yaml.org,2002:{kind}" for kind in "str int float bool null timestamp merge value seq map".split()]
# a process's arguments end at a zero, and half a surrogate pair has no bytes
_UNPRINTABLE = re.compile("[\0\ud800-\udfff]")


class Setting(NamedTuple):
    """A recipe's setting of one key.

    values:  none for a bare flag
    place:   file and line
    given:   False where an inherited flag is taken back
    problem: reason why the values are unknown; it is raised only if no other file overrides the setting
    """

    values: tuple[str, ...]
    place: str
    given: bool = True
    problem: str = ""

    @property
    def text(self) -> str:
        return " ".join(self.values)


type Section = dict[str, Setting]


class RecipeFile(NamedTuple):
    """The content of one file: the files that it extends, and its own sections."""

    parents: Setting
    sections: dict[str, Section]


def read(file: Path, variables: Mapping[str, str]) -> RecipeFile:
    """Return the sections of `file` with `variables` expanded; raises ValueError with the line of an error."""
    parents, own = Setting((), shown(file)), {}
    root = _root(file)
    harness = any(key.value in HARNESS_SECTIONS for key, _ in root.value)
    for key, node in _pairs(root, file, harness):
        name = key.value
        if name == "extends":
            parents = _entries(node, key, file, variables)
        elif name in SECTIONS:
            own[name] = dict(_settings(node, name, file, variables, harness))
        elif name == CLUSTER:
            own[name] = {name: _one_text(node, key, file, variables)}
        elif name == SETUP:
            own[name] = {name: _entries(node, key, file, variables)}
        elif name not in HARNESS_SECTIONS:
            known = ("extends", CLUSTER, SETUP, *SECTIONS)
            raise unknown("section", name, known, _place(file, key))
    return RecipeFile(parents, own)


def setting(texts: Sequence[str], place: str, plain: bool) -> Setting:
    """Return the setting of a flag; `plain` (not quoted) true and false mean a bare flag and its absence."""
    if plain and list(texts) == ["true"]:
        return Setting((), place)
    if plain and list(texts) == ["false"]:
        return Setting((), place, given=False)
    return Setting(tuple(texts), place)


class Unset(dict[str, str]):
    """Variables in which a missing one expands to its own name, to read a recipe that is not run here.

    names: variables that were read but are missing
    """

    def __init__(self, variables: Mapping[str, str]) -> None:
        super().__init__({name: value for name, value in variables.items() if value})
        self.names: list[str] = []

    def __missing__(self, name: str) -> str:
        if name not in self.names:
            self.names.append(name)
        return f"<{name}>"


def _one_text(node: Any, key: ScalarNode, file: Path, variables: Mapping[str, str]) -> Setting:
    found = _entries(node, key, file, variables)
    one = len(found.values) == 1 and found.text
    return found if one or found.problem else found._replace(problem="takes one text")


def _root(file: Path) -> MappingNode:
    root = parse(file, YAML(typ="safe", pure=True).compose)
    if not isinstance(root, MappingNode):
        raise Refused(f"{shown(file)}:1: a recipe is a mapping with the sections {', '.join(SECTIONS)}")
    return root


def _pairs(node: Any, file: Path, harness: bool = False) -> Iterator[tuple[ScalarNode, Any]]:
    """Yield keys with their values; in a file of Megatron's harness the last of two equal keys wins, as for yq."""
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, ScalarNode):
            raise Refused(f"{shown(file)}:{line}: a key is one word")
        _check_text(key, file)
        if key.value in seen and not harness:
            raise Refused(f"{shown(file)}:{line}: {key.value} is given twice, first in line {seen[key.value]}")
        seen[key.value] = line
        yield key, value


def _settings(
    node: Any, section: str, file: Path, variables: Mapping[str, str], harness: bool
) -> Iterator[tuple[str, Setting]]:
    if isinstance(node, ScalarNode) and not node.value:
        return
    if not isinstance(node, MappingNode):
        raise Refused(f"{_place(file, node)}: {section} is a mapping of keys to values")
    _check_text(node, file)
    flags = section in FLAG_SECTIONS
    for key, value in _pairs(node, file, harness):
        found = _entries(value, key, file, variables, flags)
        plain = isinstance(value, ScalarNode) and value.style is None
        yield key.value, _words(found, plain) if harness and flags else found


def _words(found: Setting, plain: bool) -> Setting:
    """Split one text into values as Megatron's harness does: text without quotes, and `[a b]`, a list there."""
    if len(found.values) != 1:
        return found
    text = found.text
    listed = text.startswith("[") and text.endswith("]")
    if not listed and not plain:
        return found
    return found._replace(values=tuple((text[1:-1] if listed else text).split()))


def _entries(node: Any, key: ScalarNode, file: Path, variables: Mapping[str, str], flags: bool = False) -> Setting:
    place, parts = _place(file, key), node.value if isinstance(node, SequenceNode) else [node]
    for part in (node, *parts):
        _check_text(part, file)
    if not all(isinstance(part, ScalarNode) for part in parts):
        raise Refused(f"{place}: a value is one text, a list of texts, true or false")
    try:
        texts = [expand(part.value, variables) for part in parts]
    except ValueError as error:
        return Setting((), place, problem=str(error))
    if flags and not any(texts):
        return Setting((), place, problem="no value; write true for a bare flag, false to take an inherited one back")
    return setting(texts, place, plain=flags and isinstance(node, ScalarNode) and node.style is None)


def _check_text(node: Any, file: Path) -> None:
    """Raise ValueError for a tag, which would convert the value, and for a text that no command line can carry."""
    if node.tag not in _PLAIN_TAGS:
        raise Refused(f"{_place(file, node)}: a recipe has texts and lists only, got the tag {node.tag!r}; remove it")
    if isinstance(node, ScalarNode) and _UNPRINTABLE.search(node.value):
        raise Refused(f"{_place(file, node)}: no command line can carry {node.value!r}; remove such characters")


def _place(file: Path, node: Any) -> str:
    return f"{shown(file)}:{node.start_mark.line + 1}"


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Return `text` with each `${NAME}` and `${NAME:-default}` replaced; an empty variable counts as missing.

    Raises ValueError for a variable that is missing and has no default, and for an unfinished `${`.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if match["fallback"] is not None:
            return variables.get(name) or expand(match["default"], variables)
        with contextlib.suppress(KeyError):
            # not .get, which would not ask an Unset
            if found := variables[name]:
                return found
        raise Refused(
            f"variable {name} is not set; set it, give a default, ${{{name}:-…}}, or a value on the command line"
        )

    rest = _VARIABLE.sub("", text)
    if "${" in rest:
        raise Refused(f"cannot read the variable in {text!r}; write ${{NAME}} or ${{NAME:-default}}")
    return _VARIABLE.sub(value, text)
