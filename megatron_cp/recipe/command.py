"""Build the command of a recipe."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from megatron_cp.errors import Refused
from megatron_cp.recipe.recipe import ENTRY, Recipe, Section, Setting, with_flag
from megatron_cp.runlog import checkpoint_iteration
from megatron_cp.units import is_whole

RENDEZVOUS_FLAGS = ("--standalone", "--master-addr", "--master-port", "--rdzv-backend", "--rdzv-endpoint")
# a recipe's settings for finding other nodes are for starting by hand; in a job they follow from SLURM
FROM_SLURM = (*RENDEZVOUS_FLAGS, "--node-rank", "--rdzv-id", "--rdzv-conf", "--local-addr")


class Command(NamedTuple):
    """Environment variables that the recipe sets, and the words of the command."""

    environment: dict[str, str]
    words: list[str]

    def __str__(self) -> str:
        """Return one command for a POSIX shell, with a flag and its values on each line."""
        assignments = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        lines = [[*assignments, self.words[0]]]
        for word in self.words[1:]:
            if word.startswith("--") or word == "-m":
                lines.append([])
            lines[-1].append(shlex.quote(word))
        return " \\\n    ".join(" ".join(line) for line in lines)


def command(recipe: Recipe) -> Command:
    """Return torchrun with the recipe's processes, entry module or script, and literal flags."""
    launch = [*_torchrun(), *flag_words(_launch_flags(recipe.launch)), *entry_words(recipe.launch)]
    environment = {name: setting.text for name, setting in recipe.env_vars.items()}
    return Command(environment, [*launch, *flag_words(recipe.model_args)])


def complete(recipe: Recipe) -> Recipe:
    """Return the recipe with --data-path from DATA, and with --load where --save holds a checkpoint."""
    if recipe.builds_corpus:
        recipe = with_flag(recipe, "--data-path", recipe.data["--output"])
    if recipe.save and "--load" not in recipe.model_args and checkpoint_iteration(recipe.save) is not None:
        recipe = with_flag(recipe, "--load", recipe.model_args["--save"])
    return recipe


def corpus_words(recipe: Recipe) -> list[str]:
    """Return the words after `megatron-cp` that build the recipe's corpus; a flag is repeated for each value."""
    words = ["data", "build"]
    for key, setting in recipe.data.items():
        words += [word for value in setting.values for word in (key, value)] or [key]
    return words


def corpus_command(recipe: Recipe) -> str:
    """Return a shell command that builds the corpus of DATA unless it exists."""
    index = shlex.quote(f"{recipe.data['--output'].text}.idx")
    build = shlex.join([sys.executable, "-m", "megatron_cp", *corpus_words(recipe)])
    return f"[ -f {index} ] || {build}"


def _torchrun() -> list[str]:
    script = Path(sys.executable).with_name("torchrun")
    return [str(script)] if script.is_file() else [sys.executable, "-m", "torch.distributed.run"]


def _launch_flags(launch: Section) -> Section:
    flags = {key: setting for key, setting in launch.items() if key != "entry"}
    if flags.get("--nnodes", Setting(("1",), "")).text == "1" and not set(RENDEZVOUS_FLAGS) & set(flags):
        # a free port, so that two runs on one machine do not meet
        return {"--standalone": Setting((), "one node"), **flags}
    return flags


def runs_through_us(recipe: Recipe) -> bool:
    """True if our entry or our launcher runs; False for a module of the user, which may do something else."""
    entry = recipe.launch["entry"].text if "entry" in recipe.launch else ENTRY
    return entry == ENTRY or entry.endswith(".py")


def entry_words(launch: Section) -> list[str]:
    """Return Python's words for the entry: a module, or an upstream script through our launcher."""
    entry = launch["entry"].text if "entry" in launch else ENTRY
    return ["-m", "megatron_cp.launch", entry] if entry.endswith(".py") else ["-m", entry]


def flag_words(section: Mapping[str, Setting]) -> list[str]:
    """Return the flags of a section, each followed by its values; `--flag=value` if the value looks like a flag."""
    return [word for key, setting in section.items() for word in _flag(key, setting.values)]


def _flag(key: str, values: tuple[str, ...]) -> tuple[str, ...]:
    if len(values) == 1 and values[0].startswith("-"):
        return (f"{key}={values[0]}",)
    return (key, *values)


def processes(recipe: Recipe) -> int | None:
    """Return the number of processes on all nodes; None where it depends on torchrun (`gpu`, `1:4`)."""
    texts = [recipe.launch[key].text if key in recipe.launch else "1" for key in ("--nproc-per-node", "--nnodes")]
    if not all(is_whole(text) for text in texts):
        return None
    return int(texts[0]) * int(texts[1])


def check_processes(recipe: Recipe) -> None:
    """Raise ValueError when the model-parallel sizes do not divide the number of processes."""
    flags = ("--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size")
    tp, pp, cp = (recipe.number(flag, 1) for flag in flags)
    started, needed = processes(recipe), tp * pp * cp
    if started is not None and (not started or started % needed):
        given = [recipe.launch[flag] for flag in ("--nnodes", "--nproc-per-node") if flag in recipe.launch]
        place = f"{given[0].place}: " if given else ""
        raise Refused(
            f"{place}TP={tp} * PP={pp} * CP={cp} needs a multiple of {needed} processes, got {started}; "
            f"change --nproc-per-node or --nnodes, or lower a size"
        )
