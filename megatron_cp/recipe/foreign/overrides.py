"""Read overrides as NeMo and Megatron-Bridge take them: words `a.b.c=value`, and YAML files of the same sections."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from megatron_cp.errors import Refused
from megatron_cp.recipe.foreign.bridge import RENAMED
from megatron_cp.recipe.foreign.bridge import SYSTEM as BRIDGE
from megatron_cp.recipe.foreign.keys import System, flat
from megatron_cp.recipe.foreign.nemo import SYSTEM as NEMO
from megatron_cp.yaml_file import parse, shown

_PAIR = re.compile(r"\+{0,2}([A-Za-z_]\w*(?:\.\w+)+)=(.*)", re.DOTALL)
_WHOLE = re.compile(r"\+{0,2}([A-Za-z_]\w*(?:\.\w+)*)=(.*)", re.DOTALL)
_SECTIONS = frozenset(name.partition(".")[0] for system in (BRIDGE, NEMO) for row in system.keys for name in row.names)
# all settings of a run stand in this section of some files
_ROOTS = ("ConfigContainer", "training")


def is_pair(word: str) -> bool:
    """True for a word such as model.num_layers=2, in a section that one of the two systems has."""
    match = _PAIR.fullmatch(word)
    return match is not None and match[1].partition(".")[0] in _SECTIONS


def values_of(words: Iterable[str]) -> dict[str, Any]:
    """Return overrides by dotted key; a value is read as YAML, as both systems do."""
    found: dict[str, Any] = {}
    for word in words:
        match = _WHOLE.fullmatch(word)
        if match is None:
            raise Refused(f"expected SECTION.KEY=VALUE, got {word!r}")
        found |= flat({match[1]: _value(match[2])})
    return found


def _value(text: str) -> Any:
    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError:
        return text


def values_in(file: Path) -> dict[str, Any]:
    """Return the values of a YAML file by dotted key."""
    found = parse(file, YAML(typ="safe", pure=True).load)
    if not isinstance(found, Mapping):
        raise Refused(f"{shown(file)}: expected sections such as model: and train:")
    if "MODEL_ARGS" in found:
        raise Refused(f"{shown(file)}: is a recipe already; check it with: megatron-cp validate {shown(file)}")
    for root in _ROOTS:
        if isinstance(found.get(root), Mapping):
            found = {**{name: value for name, value in found.items() if name != root}, **found[root]}
    return flat({RENAMED.get(str(name), str(name)): value for name, value in found.items()})


def system_of(values: Mapping[str, Any]) -> System:
    """Return whose keys these are: of the system that knows more of them."""
    best = max((BRIDGE, NEMO), key=lambda system: system.known(values))
    if not best.known(values):
        raise Refused(
            f"no key of NeMo or Megatron-Bridge among {', '.join(list(values)[:4]) or 'none'}; give flags instead"
        )
    return best


def model_of(name: str, shipped: Sequence[str]) -> str | None:
    """Return the shipped model that a recipe of these systems is named after, such as llama3_8b_pretrain_config."""

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    named = [model for model in shipped if plain(name).startswith(plain(model.rpartition("/")[2]))]
    return max(named, key=len, default=None)
