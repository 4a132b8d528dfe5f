"""Recipes: one YAML file is one training run, rendered to literal Megatron flags.

The dialect is the one of Megatron-LM's functional tests, `ENV_VARS:` and `MODEL_ARGS:` whose keys are literal flags,
and five additions:

- `extends:` one file or a list of files, relative to this file or to configs/; later ones win, this file wins over all;
- `${NAME}` and `${NAME:-default}` from the environment, anywhere in a value;
- `LAUNCH:` torchrun's own flags, and `entry`: a module to run, or an upstream script that is run through our launcher;
- `DATA:` the flags of `megatron-cp data build` for the corpus that is built before training when it is missing;
- `SLURM:` flags of sbatch, of srun for containers, and of `megatron-cp submit`.

A value is one text, a list (several values), `true` (a bare flag) or `false` (takes an inherited flag back).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode

from megatron_cp.registry import suggest
from megatron_cp.slurm import flags as slurm_flags

SECTIONS = ("ENV_VARS", "MODEL_ARGS", "LAUNCH", "DATA", "SLURM")
# where true and false mean a flag, not a text
FLAG_SECTIONS = SECTIONS[1:]
# read by Megatron's test harness; they say nothing about the training command
HARNESS_SECTIONS = ("TEST_TYPE", "METRICS", "MODE", "LAUNCHER", "THROUGHPUT_TEST_PARAMS", "SKIP_PYTEST")
DATA_FLAGS = tuple(
    f"--{name}"
    for name in "input output tokenizer glob field eod-id dtype workers max-bytes limit skip-bad no-append-eod".split()
)
TORCHRUN_FLAGS = tuple(
    f"--{name}"
    for name in (
        "nproc-per-node nnodes node-rank master-addr master-port rdzv-backend rdzv-endpoint rdzv-id rdzv-conf "
        "standalone max-restarts monitor-interval log-dir redirects tee role local-addr numa-binding"
    ).split()
)
ENTRY = "megatron_cp.pretrain_gpt"
COMMAND_LINE = "command line"

_VARIABLE = re.compile(r"\$\{(\w+)(?P<fallback>:-(?P<default>(?:[^{}]|\{[^{}]*\})*))?\}")


class Setting(NamedTuple):
    """What a recipe says for one key: its values (none for a bare flag), or that it is taken back, and where.

    `problem` says why the values are not known; it counts only when nothing else lies over the setting.
    """

    values: tuple[str, ...]
    place: str
    given: bool = True
    problem: str = ""

    @property
    def text(self) -> str:
        return " ".join(self.values)


type Section = dict[str, Setting]


@dataclass(frozen=True)
class Recipe:
    """One training run: environment variables, Megatron's flags, torchrun's flags, the corpus, and the job."""

    name: str
    env_vars: Section
    model_args: Section
    launch: Section
    data: Section
    slurm: Section = field(default_factory=dict)

    @property
    def save(self) -> Path | None:
        """Where checkpoints go; None where none are saved."""
        return Path(self.model_args["--save"].text) if "--save" in self.model_args else None

    def flag(self, name: str, default: str) -> str:
        """The value of a Megatron flag, or `default` where the recipe leaves it out."""
        return self.model_args[name].text if name in self.model_args else default

    def number(self, name: str, default: int) -> int:
        """The value of an integer flag; raises ValueError with its place when it is none."""
        text = self.flag(name, str(default))
        if not text.isdecimal():
            raise ValueError(f"{self.model_args[name].place}: {name} takes an int, got {text!r}")
        return int(text)

    @property
    def builds_corpus(self) -> bool:
        """Whether the corpus of DATA is trained on; a --data-path or --mock-data takes its place."""
        return bool(self.data) and not {"--data-path", "--mock-data"} & set(self.model_args)


def configs_folder() -> Path:
    """Where the shipped recipes lie: inside the installed package, or next to it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def shipped(folder: str = "") -> list[str]:
    """Names of the shipped recipes below a folder of configs/, as `load` takes them."""
    root = configs_folder()
    found = (path.relative_to(root) for path in (root / folder).rglob("*.yaml"))
    # a cluster's description is not a recipe
    return sorted(path.with_suffix("").as_posix() for path in found if path.parts[0] != "clusters")


def find(name: str, beside: Path | None = None) -> Path:
    """The file that `name` means: a path, or a shipped recipe's name with or without folder and `.yaml`.

    Raises ValueError with a suggestion when there is none.
    """
    root = configs_folder()
    folders = [beside or Path(), root, root / "recipes", root / "models"]
    for candidate in (folder / f"{name}{suffix}" for folder in folders for suffix in ("", ".yaml")):
        if candidate.is_file():
            return candidate
    known = shipped()
    short = [Path(entry).name for entry in known]
    raise ValueError(f"no recipe {name!r}{suggest(name, [*known, *short])}; give a file or one of: {', '.join(known)}")


def load(name: str, variables: Mapping[str, str], overrides: Sequence[str] = (), job: bool = False) -> Recipe:
    """The recipe called `name` with everything it extends merged in, and the flags of `overrides` on top.

    `variables` is what `${NAME}` refers to; with `job` the overrides may have flags of SLURM's. Raises ValueError with
    file and line for what is not a recipe.
    """
    file = find(name)
    sections = _merged(file, variables, ())
    for key, setting in command_line_flags(overrides).items():
        section = _section_of(key, job)
        # last on the rendered command line, where argparse lets it win over its own --no- form
        sections[section].pop(key, None)
        sections[section][key] = setting
    given = {name: {key: s for key, s in section.items() if s.given} for name, section in sections.items()}
    for key, setting in (item for section in given.values() for item in section.items()):
        if setting.problem:
            raise ValueError(f"{setting.place}: {key}: {setting.problem}")
    _check_keys(given)
    return Recipe(file.stem, *(given[section] for section in SECTIONS))


def command_line_flags(words: Sequence[str]) -> Section:
    """Flags with their values, as a recipe would say them; `--flag=false` takes one back."""
    found: Section = {}
    key = ""
    for word in words:
        if re.match(r"--[A-Za-z]", word):
            key, equals, value = word.partition("=")
            found[key] = _setting([value] if equals else [], COMMAND_LINE, plain=True)
        elif not key:
            raise ValueError(f"expected a --flag after the recipe, got {word!r}")
        else:
            found[key] = Setting((*found[key].values, word), COMMAND_LINE)
    return found


def _section_of(key: str, job: bool) -> str:
    if job and slurm_flags.is_slurms(key):
        return "SLURM"
    return "LAUNCH" if key in TORCHRUN_FLAGS else "MODEL_ARGS"


def _setting(texts: Sequence[str], place: str, plain: bool) -> Setting:
    if plain and list(texts) == ["true"]:
        return Setting((), place)
    if plain and list(texts) == ["false"]:
        return Setting((), place, given=False)
    return Setting(tuple(texts), place)


def _merged(file: Path, variables: Mapping[str, str], open_files: tuple[Path, ...]) -> dict[str, Section]:
    if file.resolve() in open_files:
        chain = " -> ".join(path.name for path in (*open_files, file))
        raise ValueError(f"{_shown(file)}: extends itself: {chain}; remove one of these extends")
    merged: dict[str, Section] = {section: {} for section in SECTIONS}
    own: dict[str, Section] = {}
    for key, node in _top_level(file):
        name = key.value
        if name == "extends":
            for parent in _parents(key, node, file, variables):
                path = _parent(parent, file, key)
                _lay_over(merged, _merged(path, variables, (*open_files, file.resolve())))
        elif name in SECTIONS:
            own[name] = dict(_settings(node, name, file, variables))
        elif name not in HARNESS_SECTIONS:
            known = ", ".join(("extends", *SECTIONS))
            raise ValueError(f"{_place(file, key)}: unknown section {name!r}{suggest(name, SECTIONS)}; known: {known}")
    _lay_over(merged, own)
    return merged


def _parents(key: ScalarNode, node: Any, file: Path, variables: Mapping[str, str]) -> tuple[str, ...]:
    setting = _entries(node, _place(file, key), variables)
    if setting.problem:
        raise ValueError(f"{setting.place}: {setting.problem}")
    return setting.values


def _parent(name: str, file: Path, node: Any) -> Path:
    try:
        return find(name, beside=file.parent)
    except ValueError as error:
        raise ValueError(f"{_place(file, node)}: extends: {error}") from None


def _lay_over(below: dict[str, Section], above: Mapping[str, Section]) -> None:
    for name, section in above.items():
        below[name] |= section


def _top_level(file: Path) -> Iterator[tuple[ScalarNode, Any]]:
    try:
        root = YAML(typ="safe", pure=True).compose(file.read_text(encoding="utf-8"))
    except MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = " ".join(str(error.problem or error.context).split())
        raise ValueError(f"{_shown(file)}{line}: not YAML: {problem}") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{_shown(file)}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(root, MappingNode):
        raise ValueError(f"{_shown(file)}:1: a recipe is a mapping with the sections {', '.join(SECTIONS)}")
    yield from _pairs(root, file)


def _pairs(node: Any, file: Path) -> Iterator[tuple[ScalarNode, Any]]:
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, ScalarNode):
            raise ValueError(f"{_shown(file)}:{line}: a key is one word")
        if key.value in seen:
            raise ValueError(f"{_shown(file)}:{line}: {key.value} is given twice, first in line {seen[key.value]}")
        seen[key.value] = line
        yield key, value


def _settings(node: Any, section: str, file: Path, variables: Mapping[str, str]) -> Iterator[tuple[str, Setting]]:
    if isinstance(node, ScalarNode) and not node.value:
        return
    if not isinstance(node, MappingNode):
        raise ValueError(f"{_place(file, node)}: {section} is a mapping of keys to values")
    for key, value in _pairs(node, file):
        yield key.value, _entries(value, _place(file, key), variables, flags=section in FLAG_SECTIONS)


def _entries(node: Any, place: str, variables: Mapping[str, str], flags: bool = False) -> Setting:
    parts = node.value if isinstance(node, SequenceNode) else [node]
    if not all(isinstance(part, ScalarNode) for part in parts):
        raise ValueError(f"{place}: a value is one text, a list of texts, true or false")
    try:
        texts = [expand(part.value, variables) for part in parts]
    except ValueError as error:
        return Setting((), place, problem=str(error))
    if flags and not any(texts):
        return Setting((), place, problem="no value; write true for a bare flag, false to take an inherited one back")
    return _setting(texts, place, plain=flags and isinstance(node, ScalarNode) and node.style is None)


def _place(file: Path, node: Any) -> str:
    return f"{_shown(file)}:{node.start_mark.line + 1}"


def _shown(file: Path) -> str:
    """The path as a user in this folder would write it."""
    here = Path.cwd()
    return str(file.relative_to(here) if file.is_relative_to(here) else file)


def expand(text: str, variables: Mapping[str, str]) -> str:
    """`text` with each `${NAME}` and `${NAME:-default}` replaced; an empty variable counts as missing, as in a shell.

    Raises ValueError for a variable that is missing and has no default, and for an unfinished `${`.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if variables.get(name):
            return variables[name]
        if match["fallback"] is None:
            raise ValueError(f"variable {name} is not set; set it, or give a default: ${{{name}:-…}}")
        return expand(match["default"], variables)

    rest = _VARIABLE.sub("", text)
    if "${" in rest:
        raise ValueError(f"cannot read the variable in {text!r}; write ${{NAME}} or ${{NAME:-default}}")
    return _VARIABLE.sub(value, text)


def _check_keys(sections: Mapping[str, Section]) -> None:
    slurm_flags.check({key: setting.place for key, setting in sections["SLURM"].items()})
    for key, setting in sections["ENV_VARS"].items():
        if not re.fullmatch(r"[A-Za-z_]\w*", key, re.ASCII):
            raise ValueError(f"{setting.place}: {key!r} is no name of an environment variable")
    for section, known in (("LAUNCH", (*TORCHRUN_FLAGS, "entry")), ("DATA", DATA_FLAGS)):
        for key, setting in sections[section].items():
            if key not in known:
                hint = suggest(key, known)
                raise ValueError(f"{setting.place}: unknown {section} key {key!r}{hint}; known: {', '.join(known)}")
    for key in ("--input", "--output"):
        if sections["DATA"] and key not in sections["DATA"]:
            place = next(iter(sections["DATA"].values())).place
            raise ValueError(f"{place}: DATA needs {key}; add it, or take the section out")


def with_flag(recipe: Recipe, name: str, setting: Setting) -> Recipe:
    """The recipe with one Megatron flag added at the end."""
    return replace(recipe, model_args={**recipe.model_args, name: setting})
