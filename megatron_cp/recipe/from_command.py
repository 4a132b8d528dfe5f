"""Make a recipe from what a user starts training with today: a command line, a bash script, another system's config."""

import io
import os
import re
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML

from megatron_cp.errors import Refused
from megatron_cp.recipe import shell, slurm_flags
from megatron_cp.recipe.command import FROM_SLURM
from megatron_cp.recipe.file import Section, Setting
from megatron_cp.recipe.foreign.overrides import is_pair
from megatron_cp.recipe.from_config import CONFIG_FLAGS, Translated, translated_file, translated_flags, translated_pairs
from megatron_cp.recipe.recipe import COMMAND_LINE, ENTRY, TORCHRUN_FLAGS, Recipe, command_line_flags, load

SCRIPTS = (".sh", ".bash", ".slurm", ".sbatch", ".sub", ".job")
# variables that change how a step runs, and no name, path or secret of the user's
TAKEN = (
    *("CUDA_", "NCCL_", "NVTE_", "TORCH", "PYTORCH_", "OMP_", "MKL_", "UB_", "GLOO_", "TRITON_", "UCX_", "UCC_", "FI_"),
    *(
        "NVSHMEM_",
        "SHARP_",
        "MELLANOX_",
        "CUBLAS",
        "CUDNN_",
        "TP_SOCKET",
        "TOKENIZERS_",
        "HF_DATASETS_",
        "HF_HUB_OFFLINE",
    ),
)
# set for each rank by torchrun, or named by flags of LAUNCH
_RANKS = re.compile(
    r"(MASTER_(ADDR|PORT)|(LOCAL_|GROUP_|NODE_|ROLE_)?(RANK|WORLD_SIZE)|NNODES|NUM_NODES|GPUS_PER_NODE|SLURM_.*|PMI.*|OMPI_.*)"
)
_BARE = ("--standalone", "--no-python", "--run-path", "--module", "-m")
# DeepSpeed's launcher, as torchrun's flags
_DEEPSPEED = {"--num-gpus": "--nproc-per-node", "--num-nodes": "--nnodes"}
_DEEPSPEED_BARE = (
    "--no-local-rank",
    "--no-ssh",
    "--no-ssh-check",
    "--force-multi",
    "--enable-each-rank-log",
    "--module",
)
CONFIGS = (".json", ".py", ".yaml", ".yml")
_MODULES = ("torch.distributed.run", "torch.distributed.launch")
# words that may stand before the command that they start
_BEFORE = ("exec", "nohup", "command", "time", "sudo")
# commands with flags of their own before the command that they start
_WITH_FLAGS = ("srun", "mpirun", "mpiexec", "numactl", "nsys", "apptainer", "singularity", "docker", "env")


class Imported(NamedTuple):
    """A recipe made from a command, and a line for each thing that it does not have.

    extends: shipped files that its flags stand on
    """

    recipe: Recipe
    told: list[str]
    extends: tuple[str, ...] = ()


class _Start(NamedTuple):
    """Torchrun's flags, the entry, and the flags after it."""

    launch: Section
    entry: str
    flags: Sequence[str]
    told: list[str]


def is_command(word: str) -> bool:
    """True for a word that begins a command line or names a script, where a recipe might stand."""
    return _program(word) in ("torchrun", "python", "deepspeed", *_WITH_FLAGS) or Path(word).suffix in SCRIPTS


def imported(words: Sequence[str], environment: Mapping[str, str], model: str | None = None) -> Imported:
    """Return the recipe of a command line, of the one training command that a script would start, or of a config.

    words:       the command; or a script's path and its arguments; or one text with all of them; or the path of a
        config, or overrides `a.b=c`, and flags that win over it
    environment: that a script is read in
    model:       a shipped model that the recipe extends
    Raises ValueError where there is no training command, or more than one.
    """
    if len(words) == 1 and not _is_file(words[0]):
        words = _split(words[0])
    if not words:
        raise Refused("give a command such as 'torchrun … pretrain_gpt.py …', or the path of a script or config")
    if is_pair(words[0]) or (Path(words[0]).suffix in CONFIGS and _is_file(words[0])):
        return _of_config(words, model)
    name, left_out, header = "imported", [], ""
    if Path(words[0]).suffix in SCRIPTS:
        read = _read(Path(words[0]), words[1:], environment)
        launches, left_out, name = read.launches, read.left_out, Path(words[0]).stem
        header = Path(words[0]).read_text()
    else:
        launches = [shell.Launch(list(words), {})]
    starts = [(start, launch) for launch in launches for start in _starts(launch, environment)]
    if not starts:
        seen = "; ".join(shlex.join(launch.words[:6]) for launch in launches) or "no launcher"
        raise Refused(
            f"{words[0]}: starts no training script through torchrun or python, got {seen}; "
            f"give the command itself: torchrun … pretrain_gpt.py …"
        )
    if len({(start.entry, tuple(start.flags)) for start, _ in starts}) > 1:
        raise Refused(
            f"{words[0]}: starts {len(starts)} training commands: {', '.join(start.entry for start, _ in starts)}; "
            f"give one of them as a command line"
        )
    start, launch = starts[0]
    taken, refused = _variables(launch.environment)
    made = _translated(start, model)
    start, flags = made.start, made.flags
    empty = [flag for flag, setting in flags.items() if setting.given and setting.values == ("",)]
    refused += [f"not taken: {flag} has an empty value here" for flag in empty]
    by_hand = [flag for flag in start.launch if flag in FROM_SLURM]
    launch_flags = {flag: setting for flag, setting in start.launch.items() if flag not in by_hand}
    recipe = Recipe(
        name=name,
        env_vars={key: Setting((value,), COMMAND_LINE) for key, value in taken.items()},
        model_args={flag: setting for flag, setting in flags.items() if flag not in empty},
        launch={**launch_flags, "entry": Setting((start.entry,), COMMAND_LINE)},
        data={},
    )
    told = [*start.told, *_asked_of_sbatch(header), *_found_by_hand(by_hand), *refused, *_unread(recipe)]
    return Imported(recipe, [*told, *_not_run(left_out)], made.extends)


class _Made(NamedTuple):
    """A start whose flags are Megatron's, and the files that they stand on."""

    start: _Start
    flags: Section
    extends: tuple[str, ...]


def _translated(start: _Start, model: str | None) -> _Made:
    """Translate the words of a command that are not Megatron's: overrides, and DeepSpeed's flags."""
    pairs = [word for word in start.flags if is_pair(word)]
    if pairs:
        done = translated_pairs(start.entry, start.flags, start.launch, model)
    elif any(word.partition("=")[0] in ("--deepspeed", *CONFIG_FLAGS) for word in start.flags):
        done = translated_flags(command_line_flags(start.flags), start.launch, model)
    else:
        return _Made(start, command_line_flags(start.flags), (f"models/{model}",) if model else ())
    entry = ENTRY if pairs else start.entry
    return _Made(
        start._replace(launch=done.launch, entry=entry, told=[*start.told, *done.told]), done.flags, done.extends
    )


def _of_config(words: Sequence[str], model: str | None) -> Imported:
    """Return the recipe of a config's file, or of overrides alone, and of the flags after it."""
    done: Translated = translated_file(words, model)
    recipe = Recipe(
        name="imported" if is_pair(words[0]) else Path(words[0]).stem,
        env_vars={},
        model_args=done.flags,
        launch=done.launch,
        data={},
    )
    return Imported(recipe, [*done.told, *_unread(recipe)], done.extends)


def whole(made: Imported, variables: Mapping[str, str]) -> Recipe:
    """Return the recipe over the files that it extends."""
    if not made.extends:
        return made.recipe
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{made.recipe.name}.yaml"
        file.write_text(as_yaml(made, "a config"), encoding="utf-8")
        return load(str(file), variables)


def as_yaml(made: Imported, source: str) -> str:
    """Return the text of a recipe file; what the recipe does not have is said at its top."""
    recipe, text = made.recipe, io.StringIO()
    text.write(f"# Made from: {source}\n")
    text.writelines(f"# {line}\n" for line in made.told)
    sections = {"ENV_VARS": recipe.env_vars, "LAUNCH": recipe.launch, "MODEL_ARGS": recipe.model_args}
    yaml = YAML()
    yaml.width = 4096
    if made.extends:
        text.write(f"extends: [{', '.join(made.extends)}]\n")
    yaml.dump(
        {
            name: {key: _value(setting.values) if setting.given else False for key, setting in section.items()}
            for name, section in sections.items()
            if section
        },
        text,
    )
    return text.getvalue()


def _value(values: tuple[str, ...]) -> Any:
    if not values:
        return True
    return _scalar(values[0]) if len(values) == 1 else [_scalar(value) for value in values]


def _scalar(text: str) -> Any:
    """Return a number that YAML would write with the same letters, otherwise the text."""
    if not re.fullmatch(r"-?\d[\d.eE+-]*", text):
        return text
    yaml, written = YAML(), io.StringIO()
    try:
        number = yaml.load(text)
        yaml.dump([number], written)
    except ValueError:
        return text
    return number if isinstance(number, (int, float)) and written.getvalue().strip() == f"- {text}" else text


def _is_file(word: str) -> bool:
    try:
        return Path(word).is_file()
    except OSError:
        # a command is longer than a file's name can be
        return False


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text.replace("\\\n", " "))
    except ValueError as error:
        raise Refused(f"cannot split the command into words: {error}; check its quotes") from None


def _read(script: Path, arguments: Sequence[str], environment: Mapping[str, str]) -> shell.Read:
    try:
        text = script.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"cannot read the script {script}: {getattr(error, 'strerror', None) or error}") from None
    return shell.read_script(text, str(script), list(arguments), environment)


def _starts(launch: shell.Launch, environment: Mapping[str, str]) -> Iterator[_Start]:
    """Yield the training commands behind a launcher's words."""
    words, told = list(launch.words), []
    while words:
        program = _program(words[0])
        if re.match(r"[A-Za-z_]\w*=", words[0]):
            key, _, value = words.pop(0).partition("=")
            launch.environment[key] = value
        elif program in _BEFORE:
            words.pop(0)
        elif program in _WITH_FLAGS:
            at = next((index for index, word in enumerate(words[1:], 1) if _starts_something(word)), len(words))
            if at > 1 and program != "env":
                told.append(f"not taken: {shlex.join(words[:at])}{_slurms(words[1:at])}")
            words = words[at:]
        elif program in ("bash", "sh", "eval"):
            for start in _nested(words, launch, environment):
                yield start._replace(told=[*told, *start.told])
            return
        else:
            found = _start(words)
            if found:
                yield found._replace(told=[*told, *found.told])
            return


def _starts_something(word: str) -> bool:
    known = (*_BEFORE, *_WITH_FLAGS, "torchrun", "python", "bash", "sh")
    return _program(word) in known or bool(re.match(r"[A-Za-z_]\w*=", word))


def _slurms(words: Sequence[str]) -> str:
    known = [word.partition("=")[0] for word in words if slurm_flags.is_slurms(word.partition("=")[0])]
    return f"; {', '.join(known)} may stand in the SLURM section" if known else ""


def _nested(words: Sequence[str], launch: shell.Launch, environment: Mapping[str, str]) -> Iterator[_Start]:
    """Read the text after `bash -c` or `eval`, or the script after `bash`, as a script of its own."""
    inherited = {**environment, **launch.environment}
    if _program(words[0]) == "eval":
        read = shell.read_script(" ".join(words[1:]), "eval", [], inherited)
    else:
        at = next((index for index, word in enumerate(words) if re.fullmatch(r"-[a-z]*c", word)), None)
        if at is not None:
            read = shell.read_script(" ".join(words[at + 1 : at + 2]), words[0], list(words[at + 2 :]), inherited)
        elif len(words) > 1 and Path(words[1]).is_file():
            read = _read(Path(words[1]), words[2:], inherited)
        else:
            return
    for inner in read.launches:
        launch.environment.update(inner.environment)
        yield from _starts(inner, inherited)


def _program(word: str) -> str:
    """Return the name of a program without its folder and, for Python, its version."""
    name = os.path.basename(word)
    return "python" if re.fullmatch(r"python[\d.]*", name) else name


def _start(words: Sequence[str]) -> _Start | None:
    """Read `torchrun FLAGS SCRIPT …`, `python -m torch.distributed.run FLAGS SCRIPT …` or `python SCRIPT …`."""
    program, rest = _program(words[0]), list(words[1:])
    if program == "python":
        while rest and rest[0].startswith("-") and rest[0] != "-m":
            rest.pop(0)
        if rest[:1] != ["-m"]:
            return _with_entry({}, rest, [])
        if len(rest) > 1 and rest[1] not in _MODULES:
            return _with_entry({}, rest, [])
        rest = rest[2:]
    elif program == "deepspeed":
        return _deepspeed(rest)
    elif program != "torchrun":
        return None
    launch: Section = {}
    told = []
    while rest and rest[0].startswith("-") and rest[0] != "-m":
        flag, equals, value = rest.pop(0).partition("=")
        flag = flag.replace("_", "-")
        if flag == "--module":
            rest.insert(0, "-m")
            break
        # torchrun's other flags may have no value: a script is none
        unknown = flag not in TORCHRUN_FLAGS and bool(rest) and rest[0].endswith(".py")
        bare = flag in _BARE or not rest or rest[0].startswith("--") or unknown
        values = [value] if equals else [] if bare else [rest.pop(0)]
        if flag in TORCHRUN_FLAGS and not values and flag not in _BARE:
            told.append(
                f"not taken: {flag} has no value here; set the variable that it comes from, or add it to LAUNCH"
            )
        elif flag in TORCHRUN_FLAGS:
            launch[flag] = Setting(tuple(values), COMMAND_LINE)
        else:
            told.append(f"not taken: torchrun's {shlex.join([flag, *values])}")
    return _with_entry(launch, rest, told)


def _deepspeed(rest: list[str]) -> _Start | None:
    """Read `deepspeed FLAGS SCRIPT --deepspeed …`."""
    launch: Section = {}
    told = []
    while rest and rest[0].startswith("-"):
        flag, equals, value = rest.pop(0).partition("=")
        flag = flag.replace("_", "-")
        bare = flag in _DEEPSPEED_BARE or not rest or rest[0].startswith("-") or rest[0].endswith(".py")
        values = [value] if equals else [] if bare else [rest.pop(0)]
        if flag in _DEEPSPEED and values:
            launch[_DEEPSPEED[flag]] = Setting(tuple(values), COMMAND_LINE)
        else:
            told.append(f"not taken: deepspeed's {shlex.join([flag, *values])}")
    found = _with_entry(launch, rest, told)
    # DeepSpeed's config may also be given to a script that needs no --deepspeed
    return found and found._replace(flags=[*found.flags, *(() if "--deepspeed" in found.flags else ("--deepspeed",))])


def _with_entry(launch: Section, words: Sequence[str], told: list[str]) -> _Start | None:
    """Split the words after the launcher into the entry and its flags; None where no script of training is named."""
    if not words:
        return None
    if words[0] != "-m":
        return _Start(launch, words[0], words[1:], told) if words[0].endswith(".py") else None
    module, flags = words[1] if len(words) > 1 else "", list(words[2:])
    if module == "megatron_cp.launch" and flags:
        return _Start(launch, flags[0], flags[1:], told)
    # python -m pip and the like start no training
    return _Start(launch, module, flags, told) if launch or module == ENTRY else None


def _variables(environment: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    taken = {key: value for key, value in environment.items() if key.startswith(TAKEN) and not _RANKS.fullmatch(key)}
    others = [key for key in environment if key not in taken and not _RANKS.fullmatch(key)]
    return taken, [
        f"not taken: the variables {', '.join(others)}; add to ENV_VARS what the run needs"
    ] if others else []


def _asked_of_sbatch(script: str) -> list[str]:
    asked = [line.strip() for line in re.findall(r"^#SBATCH[ \t]+([^#\n]+)", script, re.MULTILINE)]
    return [f"not taken: #SBATCH {', '.join(asked)}; give them to submit, or write them under SLURM:"] if asked else []


def _found_by_hand(flags: Sequence[str]) -> list[str]:
    if not flags:
        return []
    return [f"not taken: {', '.join(flags)}; submit takes them from SLURM, give them to train for a start by hand"]


def _unread(recipe: Recipe) -> list[str]:
    """Say which values still name a variable, which nothing reads where the command stood in single quotes."""
    flags = {**recipe.launch, **recipe.model_args}
    kept = [f"{flag} {shlex.join(setting.values)}" for flag, setting in flags.items() if "$" in "".join(setting.values)]
    if not kept:
        return []
    return [
        f"kept as written: {', '.join(kept)}; no shell reads it: write the value, or ${{NAME}} in the recipe's file"
    ]


def _not_run(commands: Sequence[str]) -> list[str]:
    if not commands:
        return []
    return [f"not run, and without output here: {', '.join(commands)}; look at values that come from them"]
