"""Build the parser of Megatron's flags and ours, from a table kept on disk where Megatron itself is not needed.

Importing Megatron to ask its parser takes seconds of CPU. The table lies in `$XDG_CACHE_HOME/megatron-cp`, by default
`~/.cache/megatron-cp`, in a file named after Megatron's sources, their sizes and times: changed sources make a new one.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from megatron_cp import config
from megatron_cp.megatron import rebind

# tables of other Megatrons that are kept
KEPT = 8
_PLAIN: dict[str, Callable[[str], Any]] = {kind.__name__: kind for kind in (int, float, str, bool)}
_KINDS = {"_StoreTrueAction": "store_true", "_StoreFalseAction": "store_false", "_StoreAction": "store"}


def parser() -> argparse.ArgumentParser:
    """Return Megatron's parser with our flags; this imports megatron.training, which takes seconds."""
    # torch warns at import about a missing CUDA, which does not matter for rendering a command
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.training.arguments import add_megatron_arguments

        return _with_ours(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


def kept_parser() -> argparse.ArgumentParser:
    """Return the same parser from the table of this Megatron, which the first call writes.

    A member of an enumeration is its name here, as in `--attention-backend flash`.
    """
    file = _file()
    table = _read(file)
    if table is None:
        table = [entry for action in parser()._actions if (entry := _entry(action))]
        _write(file, table)
        # what the table does not tell is seen at the first call as at every later one
        table = json.loads(json.dumps(table))
    found = argparse.ArgumentParser(allow_abbrev=False)
    ours = {word for action in _with_ours(argparse.ArgumentParser())._actions for word in action.option_strings}
    for entry in table:
        if not ours & set(entry["words"]):
            found.add_argument(*entry["words"], **_keywords(entry))
    return _with_ours(found)


def _with_ours(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    from megatron_cp.megatron.arguments.context import add_arguments

    return add_arguments(parser)


def _entry(action: argparse.Action) -> dict[str, Any] | None:
    """Return an action as texts and numbers; None for --help."""
    if isinstance(action, argparse._HelpAction):
        return None
    kind = _KINDS.get(type(action).__name__, "")
    if isinstance(action, argparse.BooleanOptionalAction):
        # its --no- forms are among the words, and it makes them itself
        words = [word for word in action.option_strings if not word.startswith("--no-")]
        return {"words": words, "dest": action.dest, "kind": "boolean", "default": action.default}
    if not kind:
        raise TypeError(f"megatron-core has a new kind of flag, {action.option_strings[0]}: {type(action).__name__}")
    entry = {"words": list(action.option_strings), "dest": action.dest, "kind": kind, "default": _name(action.default)}
    if kind != "store":
        return entry
    return {
        **entry,
        "nargs": action.nargs,
        "const": action.const,
        "type": _reference(action.type),
        "choices": None if action.choices is None else [_name(choice) for choice in action.choices],
    }


def _name(value: Any) -> Any:
    return value.name if isinstance(value, Enum) else value


def _reference(convert: Any) -> str | None:
    """Return the name of a type: one of Python's, or MODULE:FUNCTION; None where the value stays a text."""
    # the handlers of enumerations are inner functions, which look a member up by its name
    if convert is None or "<locals>" in convert.__qualname__:
        return None
    return convert.__name__ if convert in _PLAIN.values() else f"{convert.__module__}:{convert.__qualname__}"


def _keywords(entry: Mapping[str, Any]) -> dict[str, Any]:
    if entry["kind"] == "boolean":
        return {"dest": entry["dest"], "action": argparse.BooleanOptionalAction, "default": entry["default"]}
    keywords = {"action": entry["kind"], "dest": entry["dest"], "default": entry["default"]}
    if entry["kind"] != "store":
        return keywords
    given = {name: entry[name] for name in ("nargs", "const", "choices") if entry[name] is not None}
    return {**keywords, **given, "type": _converter(entry["type"])}


def _converter(reference: str | None) -> Callable[[str], Any] | None:
    if reference is None:
        return None
    if reference in _PLAIN:
        return _PLAIN[reference]

    def convert(text: str) -> Any:
        # imports Megatron: only a flag with a type of Megatron's own pays for it
        return rebind.find(reference).value(text)

    return convert


def _file() -> Path | None:
    """Return the table's file for the Megatron that would be imported; None where there is none."""
    spec = importlib.util.find_spec("megatron")
    if spec is None or not spec.submodule_search_locations:
        return None
    digest = hashlib.sha256()
    for folder in spec.submodule_search_locations:
        for root, folders, names in os.walk(folder):
            folders.sort()
            for name in sorted(names):
                if name.endswith(".py"):
                    found = os.stat(os.path.join(root, name))
                    digest.update(f"{root}/{name} {found.st_size} {found.st_mtime_ns}\n".encode())
    home = config.variable("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "megatron-cp" / f"flags-{digest.hexdigest()[:16]}.json"


def _read(file: Path | None) -> list[dict[str, Any]] | None:
    try:
        return json.loads(file.read_text()) if file else None
    except (OSError, ValueError):
        return None


def _write(file: Path | None, table: list[dict[str, Any]]) -> None:
    """Write the table whole or not at all; where the folder cannot be written, the next command asks Megatron again."""
    if file is None:
        return
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(table))
        part.replace(file)
        newest = sorted(file.parent.glob("flags-*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
        for old in newest[KEPT:]:
            old.unlink()
