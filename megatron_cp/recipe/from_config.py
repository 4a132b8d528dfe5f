"""Make flags of another system's config: DeepSpeed's, Colossal-AI's, NeMo's and Megatron-Bridge's."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_cp.errors import Refused
from megatron_cp.recipe.file import Section, Setting
from megatron_cp.recipe.foreign import COLOSSAL_AI, DEEPSPEED, MEGATRON_DEEPSPEED
from megatron_cp.recipe.foreign.deepspeed import as_values, flags_of_command
from megatron_cp.recipe.foreign.keys import Flags, ForeignConfig, Reading, System, flat, read
from megatron_cp.recipe.foreign.overrides import is_pair, model_of, system_of, values_in, values_of
from megatron_cp.recipe.foreign.python_config import assignments
from megatron_cp.recipe.recipe import COMMAND_LINE, ENTRY, TORCHRUN_FLAGS, command_line_flags, find, shipped
from megatron_cp.units import is_whole

CONFIG_FLAGS = ("--deepspeed_config", "--deepspeed-config")
# flags of NeMo's and Bridge's scripts: of a config beside the overrides, and of a recipe inside them
_FILE_FLAGS, _NAME_FLAGS = ("--config-file",), ("--factory", "--recipe", "--recipe-name")


class Translated(NamedTuple):
    """Megatron's flags, torchrun's, shipped files that they stand on, and the summary of all keys."""

    flags: Section
    launch: Section
    extends: tuple[str, ...]
    told: list[str]


def translated_file(words: Sequence[str], model: str | None) -> Translated:
    """Return what a config's file, or overrides alone, become; flags after it win.

    words: the file where there is one, overrides, and flags
    """
    first = next((index for index, word in enumerate(words) if word.startswith("--")), len(words))
    named, beside = list(words[:first]), command_line_flags(words[first:])
    file = None if is_pair(named[0]) else Path(named.pop(0))
    values: dict[str, Any] = {}
    if file is not None and file.suffix == ".json":
        system, values = DEEPSPEED, _json(file)
    elif file is not None and file.suffix == ".py":
        system, values = COLOSSAL_AI, assignments(file)
    else:
        values = {**(values_in(file) if file else {}), **values_of(named)}
        system, named = system_of(values), []
    if named:
        raise Refused(f"expected a --flag after {file}, got {named[0]!r}")
    if file is not None and not system.known(values):
        raise Refused(f"{file}: no key of {system.title} among {', '.join(list(values)[:4]) or 'none'}; give a command")
    return _over({}, beside, [(system, values)], model)


def translated_flags(flags: Section, launch: Section, model: str | None) -> Translated:
    """Return what the flags of a Megatron-DeepSpeed command become, with the JSON that it names."""
    given = {flag: setting.values for flag, setting in flags.items() if setting.given}
    own, others = flags_of_command(given)
    name = next((" ".join(own[flag]) for flag in CONFIG_FLAGS if flag in own), "")
    told, values = [], {}
    if name and Path(name).is_file():
        values = _json(Path(name))
    else:
        told.append(
            f"not read: DeepSpeed's config {name or '(none is named)'}, which is not here; "
            f"make it and import again, or add its flags"
        )
    parts: list[tuple[System, dict[str, Any]]] = [(DEEPSPEED, values)] if values else []
    parts.append((MEGATRON_DEEPSPEED, {**as_values(own), **_beside_flags(values)}))
    done = _over(launch, {flag: flags[flag] for flag in others}, parts, model)
    if "--load" in others:
        told.append("not read: checkpoints of DeepSpeed; --load takes Megatron's own")
    return done._replace(told=[*told, *done.told])


def translated_pairs(entry: str, words: Sequence[str], launch: Section, model: str | None) -> Translated:
    """Return what a command of NeMo or Megatron-Bridge becomes: its overrides, and the file and recipe it names."""
    pairs = [word for word in words if is_pair(word)]
    flags = command_line_flags([word for word in words if not is_pair(word) and word not in ("-y", "--yes")])
    told = [f"not taken: {entry}, in whose place runs {ENTRY}"]
    values: dict[str, Any] = {}
    for flag in [flag for flag in flags if flag in (*_FILE_FLAGS, *_NAME_FLAGS)]:
        name = flags.pop(flag).text
        found = model_of(name, [each.rpartition("/")[2] for each in shipped("models")]) if flag in _NAME_FLAGS else None
        if flag in _FILE_FLAGS and Path(name).is_file():
            values |= values_in(Path(name))
        elif found and not model:
            model = found
            told.append(f"approximated: {flag} {name}: the model {found}; its batches and rates are not known here")
        else:
            told.append(f"refused: {flag} {name}: is not here; give its settings as overrides or flags")
    values |= values_of(pairs)
    done = _over(launch, flags, [(system_of(values), values)], model)
    return done._replace(told=[*told, *done.told])


def _beside_flags(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the key of the config that the flags of the command ask for."""
    stage = values.get("zero_optimization", {})
    return {"zero_optimization.stage": stage["stage"]} if isinstance(stage, Mapping) and "stage" in stage else {}


def _over(
    launch: Section, beside: Section, parts: Sequence[tuple[System, Mapping[str, Any]]], model: str | None
) -> Translated:
    """Lay flags given by hand over those of configs, the first of which wins over the others."""
    launch = {**launch, **{flag: setting for flag, setting in beside.items() if flag in TORCHRUN_FLAGS}}
    hand: Flags = {flag: setting.values for flag, setting in beside.items()}
    readings: list[Reading] = []
    flags: Flags = {}
    for system, values in parts:
        done = read(system, ForeignConfig(values, {**hand, **flags}, _processes(launch)))
        readings.append(done)
        flags |= done.flags
    own = {flag: Setting(values, COMMAND_LINE) for flag, values in flags.items()}
    model_args = {flag: setting for flag, setting in own.items() if flag not in TORCHRUN_FLAGS}
    model_args |= {flag: setting for flag, setting in beside.items() if flag not in TORCHRUN_FLAGS}
    extends = [f"models/{model}"] if model else []
    for name in extends:
        find(name)
    # the shipped models are in bf16
    for taken, other in (("--fp16", "--bf16"), ("--bf16", "--fp16")):
        if extends and taken in model_args and other not in model_args:
            model_args[other] = Setting((), COMMAND_LINE, given=False)
    extends += [name for done in readings for name in done.extends if name not in extends]
    launch = {**{flag: setting for flag, setting in own.items() if flag in TORCHRUN_FLAGS}, **launch}
    return Translated(model_args, launch, tuple(extends), [line for done in readings for line in done.told()])


def _processes(launch: Section) -> int | None:
    texts = [launch[flag].text if flag in launch else "1" for flag in ("--nproc-per-node", "--nnodes")]
    if "--nproc-per-node" not in launch or not all(map(is_whole, texts)):
        return None
    return int(texts[0]) * int(texts[1])


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        flat(found if isinstance(found, dict) else {})
    except OSError as error:
        raise Refused(f"cannot read {file}: {error.strerror}") from None
    except RecursionError:
        raise Refused(f"{file}: nested too deeply") from None
    except ValueError as error:
        raise Refused(f"{file}: not JSON: {error}; fill in what a script would, and import again") from None
    if not isinstance(found, dict):
        raise Refused(f"{file}: expected a mapping of keys to values, as DeepSpeed's config is")
    return found
