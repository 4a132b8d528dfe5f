"""Load recipes: one YAML file is one training run, rendered to literal Megatron flags.

The dialect is the one of Megatron-LM's functional tests, `ENV_VARS:` and `MODEL_ARGS:` whose keys are literal flags,
and seven additions:

- `extends:` one file or a list of files, relative to this file or to configs/; later ones win, this file wins over all;
- `${NAME}` and `${NAME:-default}` from the environment, anywhere in a value; `${RECIPE}` is the recipe's name;
- `LAUNCH:` torchrun's own flags, and `entry`: a module to run, or an upstream script that is run through our launcher;
- `DATA:` the flags of `megatron-cp data build` for the corpus that is built before training when it is missing;
- `SLURM:` flags of sbatch, of srun for containers, and of `megatron-cp submit`;
- `SETUP:` lines of bash at the start of a SLURM job, such as `module load cuda`;
- `CLUSTER:` the machines that the run is made for: the name of a file in configs/clusters/, or a file.

A value is one text, a list (several values), `true` (a bare flag) or `false` (removes an inherited flag). Values stay
texts: tags are refused, and no shell sees them unquoted.
"""

import re
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import cast

from megatron_cp import config
from megatron_cp.config import configs_folder
from megatron_cp.errors import Refused
from megatron_cp.recipe import file, slurm_flags
from megatron_cp.recipe.file import CLUSTER, SECTIONS, SETUP, Section, Setting, read
from megatron_cp.registry import suggest, unknown
from megatron_cp.units import is_whole
from megatron_cp.yaml_file import shown

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
RECIPE = "RECIPE"
COMMAND_LINE = "command line"

_ENTRY = re.compile(r"[A-Za-z_]\w*(\.\w+)*|[^-].*\.py", re.ASCII | re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run: environment variables, flags of Megatron and torchrun, corpus, job, cluster."""

    name: str
    env_vars: Section
    model_args: Section
    launch: Section
    data: Section
    slurm: Section = field(default_factory=dict)
    cluster: str | None = None
    setup: tuple[str, ...] = ()
    # flags of SLURM that were taken back by `false`
    without: frozenset[str] = frozenset()

    @property
    def save(self) -> Path | None:
        """Folder of the checkpoints; None where none are saved."""
        return Path(self.model_args["--save"].text) if "--save" in self.model_args else None

    def flag(self, name: str, default: str) -> str:
        """Return the value of a Megatron flag, or `default` where the recipe leaves it out."""
        return self.model_args[name].text if name in self.model_args else default

    def number(self, name: str, default: int) -> int:
        """Return the value of a flag that is a size or a count; raises ValueError with its place for other values."""
        if name not in self.model_args:
            return default
        text, place = self.model_args[name].text, self.model_args[name].place
        if not is_whole(text) or not int(text):
            raise Refused(f"{place}: {name} takes a positive int, got {text!r}")
        return int(text)

    def required(self, name: str) -> int:
        """Return the value of an integer flag; raises ValueError where the recipe leaves it out."""
        if name not in self.model_args:
            raise Refused(
                f"recipe {self.name} has no {name}; add it to MODEL_ARGS, or extend a model of configs/models"
            )
        return self.number(name, 0)

    @property
    def builds_corpus(self) -> bool:
        """True if the run trains on the corpus of DATA; --data-path and --mock-data replace it."""
        return bool(self.data) and not {"--data-path", "--mock-data"} & set(self.model_args)


def shipped(folder: str = "") -> list[str]:
    """Return the names of the shipped recipes below a folder of configs/, as `load` accepts them."""
    root = configs_folder()
    found = (path.relative_to(root) for path in (root / folder).rglob("*.yaml"))
    # descriptions of clusters and of published runs are YAML files too
    return sorted(path.with_suffix("").as_posix() for path in found if path.parts[0] not in ("clusters", "published"))


def find(name: str, beside: Path | None = None) -> Path:
    """Return the file of a recipe: a path, or a shipped recipe's name with or without folder and `.yaml`.

    Raises ValueError with a suggestion when there is none.
    """
    root = configs_folder()
    folders = [beside or Path(), root, root / "recipes", root / "models"]
    for candidate in (folder / f"{name}{suffix}" for folder in folders for suffix in ("", ".yaml")):
        if candidate.is_file():
            return candidate
    known = shipped()
    # files of training/ are parts that recipes extend
    short = [Path(entry).name for entry in known if not entry.startswith("training/")]
    near = suggest(name, [*known, *short])
    raise Refused(f"no recipe {name!r}{near}; give a file, or a name of: megatron-cp list recipes")


def load(
    name: str,
    variables: Mapping[str, str],
    overrides: Sequence[str] = (),
    job: bool = False,
    site: Path | None = None,
) -> Recipe:
    """Return the recipe called `name`, merged over the files that it extends, with the flags of `overrides` on top.

    variables: values of `${NAME}`
    job:       the overrides may contain flags of SLURM
    site:      a file with ENV_VARS, SLURM and SETUP, over which everything else wins
    Raises ValueError with file and line of an error in a recipe.
    """
    file = find(name)
    known = ChainMap({RECIPE: file.stem}, cast(dict[str, str], variables))
    sections = _of_site(site, known)
    _lay_over(sections, _merged(file, known, ()))
    return _recipe(file.stem, sections, overrides, job)


def overridden(below: Recipe, overrides: Sequence[str], job: bool = False, site: Path | None = None) -> Recipe:
    """Return a recipe with the flags of `overrides` on top; `job` and `site` as in `load`."""
    names = ("env_vars", "model_args", "launch", "data", "slurm")
    sections = _of_site(site, config.environment())
    _lay_over(sections, {section: getattr(below, name) for section, name in zip(SECTIONS, names, strict=True)})
    if below.cluster:
        sections[CLUSTER] = {CLUSTER: Setting((below.cluster,), below.name)}
    return _recipe(below.name, sections, overrides, job)


def _of_site(site: Path | None, variables: Mapping[str, str]) -> dict[str, Section]:
    sections: dict[str, Section] = {section: {} for section in (*SECTIONS, CLUSTER, SETUP)}
    if site is None:
        return sections
    if not site.is_file():
        raise Refused(f"MEGATRON_CP_SITE: no file {site}; correct it, or unset the variable")
    parents, own = read(site, variables)
    for section in own.keys() - {"ENV_VARS", "SLURM", SETUP}:
        raise Refused(f"{shown(site)}: a site's file has ENV_VARS, SLURM and SETUP, got {section}; put it in a recipe")
    if parents.values:
        raise Refused(f"{parents.place}: a site's file extends no other; copy what it needs")
    return sections | own


def _recipe(name: str, sections: dict[str, Section], overrides: Sequence[str], job: bool) -> Recipe:
    for key, flag in command_line_flags(overrides, job).items():
        section = _section_of(key, job)
        # last on the rendered command line, where argparse lets it win over its own --no- form
        sections[section].pop(key, None)
        sections[section][key] = flag
    given = {name: {key: s for key, s in section.items() if s.given} for name, section in sections.items()}
    for key, found in (item for section in given.values() for item in section.items()):
        if found.problem:
            made_by = " (megatron-cp data build makes one)" if key == "--data-path" else ""
            raise Refused(f"{found.place}: {key}: {found.problem}{made_by}")
    _check_keys(given)
    cluster = given[CLUSTER][CLUSTER].text if given[CLUSTER] else None
    env_vars, model_args, launch, data, slurm = (given[section] for section in SECTIONS)
    return Recipe(
        name=name,
        env_vars=env_vars,
        model_args=model_args,
        launch=launch,
        data=data,
        slurm=slurm,
        cluster=cluster,
        setup=given[SETUP][SETUP].values if given[SETUP] else (),
        without=frozenset(sections["SLURM"].keys() - slurm.keys()),
    )


def command_line_flags(words: Sequence[str], job: bool = False) -> Section:
    """Return flags of a command line as settings; `--flag=false`, or `--flag false`, removes an inherited one.

    job: sbatch's short forms, such as `-p gpu`, are taken too
    """
    found: dict[str, list[str]] = {}
    key = ""
    for word in chain.from_iterable(map(slurm_flags.long_form, words)) if job else words:
        if re.match(r"--[A-Za-z]", word):
            key, equals, value = word.partition("=")
            # torchrun takes its own flags with underscores too
            key = dashed if (dashed := key.replace("_", "-")) in TORCHRUN_FLAGS else key
            found[key] = [value] if equals else []
        elif not key:
            raise Refused(f"expected a --flag after the recipe, got {word!r}")
        else:
            found[key].append(word)
    return {key: file.setting(values, COMMAND_LINE, plain=True) for key, values in found.items()}


def _section_of(key: str, job: bool) -> str:
    if job and slurm_flags.is_slurms(key):
        return "SLURM"
    return "LAUNCH" if key in TORCHRUN_FLAGS else "MODEL_ARGS"


def _merged(file: Path, variables: Mapping[str, str], open_files: tuple[Path, ...]) -> dict[str, Section]:
    if file.resolve() in open_files:
        circle = " -> ".join(path.name for path in (*open_files, file))
        raise Refused(f"{shown(file)}: extends itself: {circle}; remove one of these extends")
    merged: dict[str, Section] = {section: {} for section in (*SECTIONS, CLUSTER, SETUP)}
    parents, own = read(file, variables)
    if parents.problem:
        raise Refused(f"{parents.place}: {parents.problem}")
    for parent in parents.values:
        try:
            path = find(parent, beside=file.parent)
        except ValueError as error:
            raise Refused(f"{parents.place}: extends: {error}") from None
        _lay_over(merged, _merged(path, variables, (*open_files, file.resolve())))
    _lay_over(merged, own)
    return merged


def _lay_over(below: dict[str, Section], above: Mapping[str, Section]) -> None:
    for name, section in above.items():
        below[name] |= section


def _check_keys(sections: Mapping[str, Section]) -> None:
    slurm_flags.check({key: setting.place for key, setting in sections["SLURM"].items()})
    for key, setting in sections["ENV_VARS"].items():
        if not re.fullmatch(r"[A-Za-z_]\w*", key, re.ASCII):
            raise Refused(f"{setting.place}: {key!r} is not a name of an environment variable; use letters, digits, _")
    entry = sections["LAUNCH"].get("entry")
    if entry and not _ENTRY.fullmatch(entry.text):
        raise Refused(
            f"{entry.place}: entry is a module such as {ENTRY} or a script that ends in .py, got {entry.text!r}"
        )
    for section, known in (("LAUNCH", (*TORCHRUN_FLAGS, "entry")), ("DATA", DATA_FLAGS)):
        for key, setting in sections[section].items():
            if key not in known:
                raise unknown(f"{section} key", key, known, setting.place)
    for key in ("--input", "--output"):
        if sections["DATA"] and key not in sections["DATA"]:
            place = next(iter(sections["DATA"].values())).place
            raise Refused(f"{place}: DATA needs {key}; add it, or take the section out")


def with_flag(recipe: Recipe, name: str, setting: Setting) -> Recipe:
    """Return the recipe with one Megatron flag added at the end."""
    return replace(recipe, model_args={**recipe.model_args, name: setting})
