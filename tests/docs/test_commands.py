"""Every command in the README and the pages is one that the command line takes."""

import argparse
import re
import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from torch.distributed.run import get_args_parser

from docs.generate import commands
from megatron_cp.cli import app
from megatron_cp.megatron.arguments.known_flags import parser
from megatron_cp.megatron.arguments.recipe_flags import check
from megatron_cp.recipe import recipe, slurm_flags
from tests.docs.pages import ROOT, TEXT, blocks, inline_code, shell_lines

ROOT_COMMAND = typer.main.get_command(app)
COMMANDS = commands(ROOT_COMMAND)
SHELL = sorted(set(shell_lines()))
SHIPPED = {Path(name).name for name in recipe.shipped("recipes")}
"""Recipes that a page may name without bringing a file."""
EXTRAS = set(re.findall(r'^        "(\w+)": \[', (ROOT / "setup.py").read_text(), re.MULTILINE))


@cache
def megatrons() -> argparse.ArgumentParser:
    return parser()


def check_flags(words: Sequence[str]) -> None:
    """Raise ValueError for what neither Megatron nor we take."""
    check(recipe.command_line_flags(words), megatrons())


def parse(words: Sequence[str]) -> None:
    """Raise for what `megatron-cp WORDS` would refuse before it does anything."""
    name = next((name for name in (" ".join(words[:2]), words[0]) if name in COMMANDS), "")
    assert name, f"no command {words}"
    command = COMMANDS[name]
    # asked for behind a recipe too, where they are words like Megatron's flags
    asks_for_script = ("--dry-run", "--slurm")
    rest = [word for word in words[len(name.split()) :] if word not in asks_for_script]
    with command.make_context(name, rest) as context:
        words = [*(context.params.get("words") or []), *context.args]
        flags = [*(context.params.get("flags") or []), *context.args]
        recipes = [context.params["name"]] if "flags" in context.params else words[: first_flag(words)]
    for one in filter(None, recipes):
        check_recipe(one, flags if "flags" in context.params else words[first_flag(words) :], name == "submit")


def first_flag(words: Sequence[str]) -> int:
    return next((index for index, word in enumerate(words) if word.startswith("--")), len(words))


def check_recipe(name: str, flags: Sequence[str], job: bool) -> None:
    """Load a shipped recipe with these flags, or the quickstart in the place of a file that a reader would write."""
    shipped = name if name in SHIPPED else "quickstart"
    run = recipe.load(shipped, {"DATA_PATH": "corpus"}, flags, job)
    check(run.model_args, megatrons())


@pytest.mark.parametrize(("page", "line"), SHELL)
def test_commands_of_a_page_parse(page: str, line: str) -> None:
    words = [word for word in shlex.split(line) if word != "…"]
    CHECKS[words[0]](words)


def check_torchrun(words: Sequence[str]) -> None:
    known, rest = get_args_parser().parse_known_args([*words[1:]])
    assert not rest
    given = list(known.training_script_args)
    if not known.module:
        assert (ROOT / known.training_script).exists()
        return
    assert known.training_script in ("megatron_cp.launch", "megatron_cp.pretrain_gpt")
    if known.training_script == "megatron_cp.launch":
        assert given.pop(0).endswith(".py")
    if given != ["FLAGS"]:
        check_flags(given)


def check_pip(words: Sequence[str]) -> None:
    assert words[1] == "install"
    named = re.findall(r"\[(\w+)\]", " ".join(words))
    assert set(named) <= EXTRAS, named


def check_script(words: Sequence[str]) -> None:
    script = next(word for word in words[1:] if word.startswith("scripts/"))
    assert (ROOT / script).is_file(), script
    if script == "scripts/train.sh" and len(words) > 2:
        check_recipe(words[2], words[3:], job=False)


CHECKS: dict[str, Any] = {
    "megatron-cp": lambda words: parse(words[1:]),
    "torchrun": check_torchrun,
    "pip": check_pip,
    "bash": check_script,
    "sbatch": check_script,
    "source": lambda words: None,
    "export": lambda words: None,
}


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("megatron-cp trace --backend zigzag --ranks 8 --seq 4096 --tokens 3", "No such option: --tokens"),
        ("megatron-cp trace --backend zigzag --ranks 8 --seq many", "takes a count such as 4M"),
        ("megatron-cp train quickstart --context-parallel 2", "unknown flag '--context-parallel'"),
        ("megatron-cp submit quickstart --gpu-type a100", "unknown flag '--gpu-type'"),
        ("megatron-cp nonsense --flag", "no command"),
        ("torchrun --nproc-per-node 2 -m megatron_cp.launch pretrain_gpt.py --cp-kind usp", "unknown flag '--cp-kind'"),
        ("pip install 'megatron-cp[everything]'", "everything"),
        ("bash scripts/nothing.sh", "nothing.sh"),
    ],
)
def test_a_wrong_command_is_noticed(line: str, fault: str) -> None:
    words = shlex.split(line)
    with pytest.raises(Exception, match=re.escape(fault)):
        CHECKS[words[0]](words)


@pytest.mark.parametrize(
    ("page", "code"), sorted({one for one in inline_code() if one[1].startswith("megatron-cp ") and len(one[1]) > 12})
)
def test_commands_in_running_text_have_their_options(page: str, code: str) -> None:
    line = code.removeprefix("megatron-cp ")
    name = next(name for name in sorted(COMMANDS, key=len)[::-1] if f"{line} ".startswith(f"{name} "))
    options = {option for one in COMMANDS[name].params for option in (*one.opts, *one.secondary_opts)}
    asked = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", line))
    # what these commands do not know is Megatron's, torchrun's or sbatch's
    passed_on = any(one.nargs == -1 for one in COMMANDS[name].params) and name != "data build"
    assert passed_on or asked <= options


@pytest.mark.parametrize(
    ("page", "flag"),
    sorted(
        {
            (page, flag)
            for page, code in inline_code()
            for flag in re.findall(r"^--[a-z0-9-]*[a-z0-9](?![a-z0-9-])", code)
        }
    ),
)
def test_flags_in_running_text_are_known(page: str, flag: str) -> None:
    options = {option for one in (ROOT_COMMAND, *COMMANDS.values()) for param in one.params for option in param.opts}
    options |= {option for one in COMMANDS.values() for param in one.params for option in param.secondary_opts}
    torchruns = {option for action in get_args_parser()._actions for option in action.option_strings}
    scripts = {"--check", "--apply", "--revert", "--write"}
    assert flag in options | torchruns | scripts | set(megatrons()._option_string_actions) | set(slurm_flags.KNOWN)


def test_every_command_has_a_row_and_every_row_a_command() -> None:
    rows = re.findall(r"^\| `megatron-cp ([a-z-]+(?: [a-z]+)?)", TEXT["docs/commands.md"], re.MULTILINE)
    assert sorted(set(rows)) == sorted(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name: str) -> None:
    assert all(one.help for one in COMMANDS[name].params if one.name != "help")


@pytest.mark.parametrize("one", [one for one in blocks() if one.kind == "yaml"], ids=lambda one: one.page)
def test_recipes_of_a_page_load(one, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(one.text)
    run = recipe.load(str(file), {"DATA_PATH": "corpus"})
    check(run.model_args, megatrons())
